"""Every option and variable of vLLM is judged: it counts in the model digest, or neutral.py says why it doesn't.

vectors/counted_options.json has those that count, with the defaults that they have in all supported releases. A release
that adds one fails here until it is in one of the two; so does a changed default, of which neutral.DEFAULTS then says
what counts as not set.
"""

import dataclasses
import json

import pytest
import vllm.config
from vllm.envs import environment_variables

from hyperspace_vllm.vllm_adapter.fingerprint import _counted
from hyperspace_vllm.vllm_adapter.neutral import DEFAULTS, NEUTRAL_OPTIONS, NEUTRAL_VARIABLES
from hyperspace_vllm.vllm_adapter.older_vllm import make_arg_parser
from tests.support.paths import VECTORS

pytestmark = pytest.mark.feature("every option of the server is judged")

COUNTED = json.loads((VECTORS / "counted_options.json").read_text())
PARTLY = {
    "attention_config": "AttentionConfig",
    "aux_output_config": "AuxOutputConfig",
    "diffusion_config": "DiffusionConfig",
    "pooler_config": "PoolerConfig",
    "reasoning_config": "ReasoningConfig",
    "speculative_config": "SpeculativeConfig",
    "structured_outputs_config": "StructuredOutputsConfig",
    "watermark_config": "WatermarkConfig",
}


def test_every_option_of_this_vllm_is_judged() -> None:
    theirs = vars(make_arg_parser().parse_args([]))
    assert theirs.keys() - NEUTRAL_OPTIONS - COUNTED["options"].keys() == set(), "options that were not judged"
    for name in theirs.keys() & COUNTED["options"].keys() - DEFAULTS.keys():
        assert _counted(name, theirs[name]) == COUNTED["options"][name], f"the default of {name} has changed"


@pytest.mark.parametrize("name", PARTLY)
def test_every_field_of_an_option_that_counts_in_part_is_judged(name: str) -> None:
    if (config := getattr(vllm.config, PARTLY[name], None)) is None:
        pytest.skip(f"this vLLM has no {name}")
    theirs = {f"{name}.{each.name}" for each in dataclasses.fields(config) if not each.name.startswith("_")}
    assert theirs - NEUTRAL_OPTIONS - set(COUNTED["fields"]) == set(), "fields that were not judged"


def test_every_variable_of_this_vllm_is_judged() -> None:
    assert environment_variables.keys() - NEUTRAL_VARIABLES - set(COUNTED["variables"]) == set()


def test_what_counts_is_not_among_what_does_not() -> None:
    counted = {*COUNTED["options"], *COUNTED["fields"]}
    assert counted & NEUTRAL_OPTIONS == set()
    assert {name.partition(".")[0] for name in counted if "." in name} == PARTLY.keys()
    assert set(COUNTED["variables"]) & NEUTRAL_VARIABLES == set()
