"""Everything that depends on vLLM: the plugin, the KV connector, and what identifies an engine.

Input: vLLM's calls, in its scheduler, workers and API server. Output: lookups to the node and copies between paged KV
and the arena. An error of Hyperspace ends in a miss and one log line, never in vLLM. No other package imports vLLM.
"""
