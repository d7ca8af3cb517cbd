"""vLLM's options and variables that affect no answer, with the reason; every other one counts in the model digest.

Context: a list of what counts was always out of date, so a server started with another flag gave old answers. Choice:
the list is of what doesn't count, as for the fields of requests; what a release adds counts where it is set, until it
is judged (test_neutral.py fails until then). Rejected: vLLM's own `compute_hash`, which is about compiled graphs. Cost:
an option that affects no answer but isn't here keeps servers apart that could share.

A name with a point is a field of an option that has several.
"""

_OPTIONS = {
    "listeners, access, and the middleware between clients and the cache": """
        allow_credentials allowed_headers allowed_methods allowed_origins api_key config
        data_parallel_supervisor_port disable_fastapi_docs dp_supervisor_probe_failure_threshold
        dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s enable_offline_docs enable_request_id_headers
        enable_scale_out enable_server_load_tracking enable_ssl_refresh enable_tokenizer_info_endpoint grpc
        grpc_port h11_max_header_count h11_max_incomplete_event_size headless host middleware port root_path
        shutdown_timeout sse_keep_alive_interval ssl_ca_certs ssl_cert_reqs ssl_certfile ssl_ciphers ssl_keyfile
        stream_interval uds
    """,
    "what it logs, measures and traces": """
        aggregate_engine_logging collect_detailed_traces cudagraph_metrics custom_histogram_buckets
        disable_access_log_for_endpoints disable_log_stats disable_uvicorn_access_log enable_layerwise_nvtx_tracing
        enable_log_deltas enable_log_outputs enable_log_requests enable_logging_iteration_details enable_mfu_metrics
        enable_mm_processor_stats fail_on_environ_validation jit_monitor_mode jit_monitor_verbose kv_cache_metrics
        kv_cache_metrics_sample log_config_file log_error_stack log_level logging_config max_log_len
        otlp_traces_endpoint profiler_config ray_workers_use_nsight show_hidden_metrics_for_version use_tqdm_on_load
        uvicorn_log_level watchdog_config
    """,
    "how the work is divided among processes, devices and hosts, and how these talk": """
        all2all_backend api_server_count cp_kv_cache_interleave_size
        cpu_distributed_timeout_seconds data_parallel_address data_parallel_backend data_parallel_external_lb
        data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
        data_parallel_size data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
        dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
        decode_context_parallel_size device_ids disable_custom_all_reduce disable_nccl_for_dp_synchronization
        distributed_executor_backend distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size
        enable_batch_sharded_sampling enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
        enable_expert_parallel enable_fault_tolerance enable_hc_sp enable_shm_tensor_arena eplb_config
        expert_placement_strategy fault_tolerance_config fully_sharded_loras master_addr master_port
        max_parallel_loading_workers mm_encoder_tp_mode mm_tensor_ipc nnodes node_rank numa_bind numa_bind_cpus
        numa_bind_nodes pipeline_parallel_size prefill_context_parallel_size renderer_num_workers
        tensor_parallel_size ubatch_size
    """,
    "how memory is shared out, what is batched with what, and what is kept to be used again": """
        async_scheduling aux_output_config.max_bytes block_size cpu_offload_gb cpu_offload_params
        disable_chunked_mm_input disable_hybrid_kv_cache_manager ec_manager_config ec_transfer_config
        enable_chunked_prefill enable_cumem_allocator enable_mamba_fine_grained_prefix_cache
        enable_mamba_shared_prefix_checkpoint enable_nccl_comm_suspend
        enable_prefix_caching enable_sleep_mode engram_config gpu_memory_utilization kv_cache_memory_bytes
        kv_connector kv_events_config kv_offloading_backend kv_offloading_size kv_transfer_config
        long_prefill_token_threshold long_prefill_token_threshold_adaptive mamba_block_size mamba_cache_mode
        max_cpu_loras max_loras max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
        max_num_scheduled_tokens max_num_seqs mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
        mm_processor_cache_type mm_shm_cache_max_object_size_mb num_gpu_blocks_override offload_backend
        offload_group_size offload_num_in_group offload_params offload_prefetch_step prefill_schedule_interval
        prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit replayssm_buffer_len
        scheduler_reserve_full_isl scheduling_policy skip_mm_profiling sleep_mode_backend
        sleep_mode_offload_cudagraph sleep_preserve_parameter_names swa_bounded_replay use_replayssm watermark
        weight_transfer_config
    """,
    "which kernels compute the same, so that results differ in their last bits at most": """
        attention_backend attention_config.backend attention_config.backend_per_kind
        attention_config.flash_attn_max_num_splits_for_cuda_graph attention_config.flash_attn_version
        attention_config.flex_attn_block_m attention_config.flex_attn_block_n
        attention_config.flex_attn_kv_block_size attention_config.flex_attn_q_block_size
        attention_config.hisparse_config attention_config.indexer_tp_shard_min_rows
        attention_config.minimax_m3_indexer_cp attention_config.minimax_m3_msa_decode_backend
        attention_config.mla_prefill_backend attention_config.sparse_mla_force_mqa
        attention_config.sparse_mla_prefill_workspace_factor attention_config.tokenspeed_mla_min_split_kv
        attention_config.tq_max_kv_splits_for_cuda_graph attention_config.trtllm_ragged_backend
        attention_config.use_trtllm_attention compilation_config cudagraph_capture_sizes disable_cascade_attn
        enable_bf16x3_router_gemm enable_flash_late_interaction enable_flashinfer_autotune enforce_eager
        gdn_prefill_backend ir_op_priority kda_decode_backend kda_prefill_backend kernel_config linear_backend
        mamba_backend mamba_ssu_algorithm max_cudagraph_capture_size
        mm_device_do_normalize mm_encoder_attn_backend mm_processor_device moe_backend monokernel optimization_level
        performance_mode pooler_config.enable_flash_late_interaction sparse_indexer_topk_backend
        specialize_active_lora
    """,
    "what is proposed to the model, which decides; how it decides counts (rejection_sample_method and others)": """
        spec_method spec_model spec_tokens speculative_config.attention_backend speculative_config.code_revision
        speculative_config.disable_eagle_block_drop speculative_config.disable_lookahead_block_hashes
        speculative_config.disable_padded_drafter_batch speculative_config.draft_lm_head_quantization
        speculative_config.draft_load_config speculative_config.draft_model_config
        speculative_config.draft_parallel_config speculative_config.draft_sample_method
        speculative_config.draft_tensor_parallel_size speculative_config.dspark_draft_topk
        speculative_config.enable_adaptive_verification speculative_config.enforce_eager
        speculative_config.index_share_for_mtp_iteration speculative_config.kv_cache_dtype
        speculative_config.max_model_len speculative_config.method speculative_config.model
        speculative_config.moe_backend speculative_config.num_speculative_tokens
        speculative_config.num_speculative_tokens_per_batch_size speculative_config.parallel_drafting
        speculative_config.prompt_lookup_max speculative_config.prompt_lookup_min speculative_config.quantization
        speculative_config.revision speculative_config.suffix_decoding_max_cached_requests
        speculative_config.suffix_decoding_max_spec_factor speculative_config.suffix_decoding_max_tree_depth
        speculative_config.suffix_decoding_min_token_prob speculative_config.target_model_config
        speculative_config.target_parallel_config speculative_config.tensor_parallel_size
        speculative_config.use_heterogeneous_vocab speculative_config.use_local_argmax_reduction
    """,
    "where files lie: what is in them counts (`Identity`); an adapter's are in the keys of its requests": """
        code_revision config_format download_dir enable_lora hf_config_path hf_token load_format lora_modules
        max_lora_cls_labels max_lora_rank mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path model
        model_tag model_weights pt_load_map_location revision safetensors_load_strategy
        safetensors_prefetch_block_size safetensors_prefetch_num_threads tokenizer tokenizer_revision
        trust_remote_code
    """,
    "what comes of them counts: `model_digest` takes it from the engine's configuration": """
        allow_deprecated_quantization convert disable_sliding_window dtype generation_config hf_overrides
        max_model_len pooler_config quantization quantization_config runner served_model_name
    """,
    "the requests that they affect are not cached: remote media, other endpoints, streams with usage in each frame": """
        allowed_local_media_path allowed_media_domains cohere_is_reasoning_model enable_force_include_usage
    """,
}

# Variables of vllm.envs. A precision below that of the weights counts, as kv_cache_dtype does.
_VARIABLES = {
    "how vLLM was built": """
        CMAKE_BUILD_TYPE MAX_JOBS NVCC_THREADS VERBOSE VLLM_BUILD_COMMIT VLLM_BUILD_PIPELINE VLLM_BUILD_URL
        VLLM_DOCKER_BUILD_CONTEXT VLLM_IMAGE_TAG VLLM_MAIN_CUDA_VERSION VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX
        VLLM_SKIP_VERSION_SUFFIX VLLM_TARGET_DEVICE VLLM_USE_PRECOMPILED VLLM_USE_PRECOMPILED_RUST
    """,
    "where files, libraries and caches lie": """
        CUDA_HOME LD_LIBRARY_PATH S3_ACCESS_KEY_ID S3_ENDPOINT_URL S3_SECRET_ACCESS_KEY
        VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_ASSETS_CACHE VLLM_ASSETS_CACHE_MODEL_CLEAN VLLM_CACHE_ROOT
        VLLM_COMPILE_CACHE_SAVE_FORMAT VLLM_CONFIG_ROOT VLLM_CUDART_SO_PATH VLLM_CUDA_COMPATIBILITY_PATH
        VLLM_DISABLE_COMPILE_CACHE VLLM_ENABLE_CUDA_COMPATIBILITY VLLM_FASTSAFETENSORS_QUEUE_SIZE
        VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR VLLM_LORA_RESOLVER_CACHE_DIR VLLM_LORA_RESOLVER_HF_REPO_LIST
        VLLM_MODEL_REDIRECT_PATH VLLM_NCCL_INCLUDE_PATH VLLM_NCCL_SO_PATH VLLM_RUST_FRONTEND_PATH
        VLLM_TUNED_CONFIG_FOLDER VLLM_USE_MODELSCOPE VLLM_V1_USE_OUTLINES_CACHE VLLM_XGRAMMAR_CACHE_MB
        VLLM_XLA_CACHE_PATH
    """,
    "how media are fetched that aren't inline": """
        VLLM_AUDIO_FETCH_TIMEOUT VLLM_IMAGE_FETCH_TIMEOUT VLLM_MAX_AUDIO_PREPROCESS_WORKERS
        VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB VLLM_MEDIA_CACHE
        VLLM_MEDIA_CACHE_MAX_SIZE_MB VLLM_MEDIA_CACHE_TTL_HOURS VLLM_MEDIA_FETCH_MAX_RETRIES
        VLLM_MEDIA_LOADING_THREAD_COUNT VLLM_MEDIA_URL_ALLOW_REDIRECTS VLLM_VIDEO_FETCH_TIMEOUT
    """,
    "logs, statistics, debugging": """
        FORCE_COLOR NO_COLOR VLLM_CONFIGURE_LOGGING VLLM_CUSTOM_SCOPES_FOR_PROFILING VLLM_DEBUG_DUMP_PATH
        VLLM_DEBUG_LOG_API_SERVER_RESPONSE VLLM_DEBUG_MFU_METRICS VLLM_DEBUG_WORKSPACE VLLM_DISABLE_LOG_LOGO
        VLLM_DO_NOT_TRACK VLLM_GC_DEBUG VLLM_GPU_SYNC_CHECK VLLM_LOGGING_COLOR VLLM_LOGGING_CONFIG_PATH
        VLLM_LOGGING_LEVEL VLLM_LOGGING_PREFIX VLLM_LOGGING_STREAM VLLM_LOG_BATCHSIZE_INTERVAL
        VLLM_LOG_MODEL_INSPECTION VLLM_LOG_STATS_INTERVAL VLLM_MOONCAKE_STORE_TIER_LOG VLLM_NO_USAGE_STATS
        VLLM_NVTX_SCOPES_FOR_PROFILING VLLM_PATTERN_MATCH_DEBUG VLLM_PROCESS_NAME_PREFIX VLLM_REQUEST_BODY_LOG_LEVEL
        VLLM_RINGBUFFER_WARNING_INTERVAL VLLM_SERVER_DEV_MODE VLLM_TRACE_FUNCTION VLLM_USAGE_SOURCE
        VLLM_USAGE_STATS_SERVER VLLM_XLA_CHECK_RECOMPILATION
    """,
    "how long something is waited for": """
        VLLM_CHAT_TEMPLATE_FUEL VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT VLLM_ENGINE_ITERATION_TIMEOUT_S
        VLLM_ENGINE_READY_TIMEOUT_S VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS VLLM_HTTP_TIMEOUT_KEEP_ALIVE
        VLLM_KEEP_ALIVE_ON_ENGINE_DEATH VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT VLLM_MOONCAKE_CONNECTOR_TIMEOUT
        VLLM_P2P_HANDSHAKE_TIMEOUT_S VLLM_P2P_IDLE_TIMEOUT_S VLLM_REGEX_COMPILATION_TIMEOUT_S
        VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS
    """,
    "processes, devices, hosts and how they talk": """
        CUDA_VISIBLE_DEVICES LOCAL_RANK MOONCAKE_PREFERRED_SEGMENT MOONCAKE_REQUESTER_LOCAL_HOSTNAME
        VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_ALLREDUCE_USE_FLASHINFER VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC
        VLLM_ALLREDUCE_USE_SYMM_MEM VLLM_API_KEY VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND
        VLLM_DBO_COMM_SMS VLLM_DCP_Q_REPLICATE VLLM_DEEPEP_BUFFER_SIZE_MB
        VLLM_DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL
        VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION VLLM_DEEPEP_V2_PREFER_OVERLAP
        VLLM_DISABLE_PYNCCL VLLM_DISABLE_REQUEST_ID_RANDOMIZATION VLLM_DISTRIBUTED_USE_SPLIT_GROUP VLLM_DP_MASTER_IP
        VLLM_DP_MASTER_PORT VLLM_DP_RANK VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_EC_SIDE_CHANNEL_HOST
        VLLM_EC_SIDE_CHANNEL_PORT VLLM_ELASTIC_EP_DRAIN_REQUESTS VLLM_ELASTIC_EP_SCALE_UP_LAUNCH
        VLLM_ENABLE_COHERE_API VLLM_ENABLE_STARTUP_PLAN VLLM_ENABLE_V1_MULTIPROCESSING
        VLLM_FLASHINFER_ALLREDUCE_BACKEND VLLM_GPU_NIC_PCIE_MAPPING VLLM_HOST_IP VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES
        VLLM_LOOPBACK_IP VLLM_MOONCAKE_BOOTSTRAP_PORT VLLM_MOONCAKE_DISK_STAGING_USABLE_RATIO
        VLLM_MOONCAKE_LOAD_RECV_THREADS VLLM_MQ_MAX_CHUNK_BYTES_MB VLLM_MSGPACK_ZERO_COPY_THRESHOLD
        VLLM_NIC_SELECTION_VARS VLLM_NIXL_EP_MAX_NUM_RANKS VLLM_NIXL_SIDE_CHANNEL_HOST VLLM_NIXL_SIDE_CHANNEL_PORT
        VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME VLLM_P2P_MAX_PEERS VLLM_P2P_SIDE_CHANNEL_HOST VLLM_P2P_SIDE_CHANNEL_PORT
        VLLM_PORT VLLM_PP_LAYER_PARTITION VLLM_RANDOMIZE_DP_DUMMY_INPUTS VLLM_RAY_BUNDLE_INDICES
        VLLM_RAY_DP_PACK_STRATEGY VLLM_RAY_DP_PLACEMENT_NODE_IPS VLLM_RAY_EXTRA_ENV_VARS_TO_COPY
        VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY VLLM_RAY_PER_WORKER_GPUS VLLM_RPC_BASE_PATH VLLM_SKIP_P2P_CHECK
        VLLM_TPU_USING_PATHWAYS VLLM_USE_DIRECT_DCP_A2A VLLM_USE_DIRECT_DCP_KV_GATHER VLLM_USE_DIRECT_DCP_Q_GATHER
        VLLM_USE_NCCL_SYMM_MEM VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM
        VLLM_USE_RAY_V2_EXECUTOR_BACKEND VLLM_USE_RAY_WRAPPED_PP_COMM VLLM_USE_RUST_BENCH VLLM_USE_RUST_FRONTEND
        VLLM_USE_SPINLOOP_EXT VLLM_V1_OUTPUT_PROC_CHUNK_SIZE VLLM_WORKER_MULTIPROC_METHOD VLLM_XLA_USE_SPMD
        VLLM_XPU_PP_MICROBATCH
    """,
    "memory, and what is kept": """
        VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE
        VLLM_ALLOW_LONG_MAX_MODEL_LEN VLLM_CPU_CI_ENV VLLM_CPU_KVCACHE_SPACE VLLM_ENABLE_CUDAGRAPH_GC
        VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE VLLM_KV_CACHE_LAYOUT VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS
        VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS VLLM_MM_HASHER_ALGORITHM VLLM_PLE_CPU_OFFLOAD
        VLLM_PREFIX_CACHE_RETENTION_INTERVAL
        VLLM_ROCM_SLEEP_MEM_CHUNK_SIZE VLLM_SPARSE_INDEXER_MAX_LOGITS_MB VLLM_SSM_CONV_STATE_LAYOUT
        VLLM_USE_SIMPLE_KV_OFFLOAD VLLM_WEIGHT_OFFLOADING_DISABLE_PIN_MEMORY VLLM_WEIGHT_OFFLOADING_DISABLE_UVA
        VLLM_WSL2_ENABLE_PIN_MEMORY
    """,
    "kernels and compilers that compute the same": """
        VLLM_BATCH_INVARIANT VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD
        VLLM_CPU_ATTN_SPLIT_KV VLLM_DEEP_GEMM_WARMUP VLLM_DISABLED_KERNELS
        VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION VLLM_DISABLE_SHARED_EXPERTS_STREAM
        VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE VLLM_ENABLE_GEMM_RS VLLM_ENABLE_HPC_OPS
        VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE VLLM_ENABLE_PREGRAD_PASSES
        VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS VLLM_FLOAT32_MATMUL_PRECISION VLLM_FORCE_AOT_LOAD VLLM_GDN_DECODE_KERNEL
        VLLM_HAS_FLASHINFER_CUBIN VLLM_HUMMING_MOE_GEMM_TYPE VLLM_KIMI_K3_AUX_ATTN_RES_STREAM VLLM_KIMI_K3_GEMM_AR
        VLLM_KIMI_K3_GEMM_RS VLLM_KIMI_K3_SHARD_SP_SHARED_EXPERT VLLM_LORA_DISABLE_PDL VLLM_LORA_ENABLE_DUAL_STREAM
        VLLM_MARLIN_USE_ATOMIC_ADD VLLM_MLA_DISABLE VLLM_MOE_SKIP_PADDING VLLM_MOE_USE_DEEP_GEMM
        VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD
        VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD VLLM_REPLICATE_EMBED VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS
        VLLM_ROCM_AITER_MLA_ASM_PADDING VLLM_ROCM_AITER_MLA_DCP_VERIFY VLLM_ROCM_AITER_MOE_DISPATCH_POLICY
        VLLM_ROCM_FP8_MFMA_PAGE_ATTN VLLM_ROCM_FP8_PADDING VLLM_ROCM_MOE_PADDING VLLM_ROCM_MONO_DECODE
        VLLM_ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16 VLLM_ROCM_QUICK_REDUCE_MAX_SIZE_BYTES_MB
        VLLM_ROCM_QUICK_REDUCE_MIN_SIZE_BYTES_MB VLLM_ROCM_QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB
        VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT VLLM_ROCM_USE_AITER VLLM_ROCM_USE_AITER_CUSTOM_AR
        VLLM_ROCM_USE_AITER_FP4BMM VLLM_ROCM_USE_AITER_FP4_ASM_GEMM VLLM_ROCM_USE_AITER_FP8BMM
        VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS VLLM_ROCM_USE_AITER_LINEAR VLLM_ROCM_USE_AITER_LINEAR_HIPBMM
        VLLM_ROCM_USE_AITER_MHA VLLM_ROCM_USE_AITER_MLA VLLM_ROCM_USE_AITER_MOE VLLM_ROCM_USE_AITER_RMSNORM
        VLLM_ROCM_USE_AITER_TRITON_GEMM VLLM_ROCM_USE_AITER_TRITON_ROPE VLLM_ROCM_USE_AITER_TRITON_SPARSE_MLA
        VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION VLLM_ROCM_USE_SKINNY_GEMM VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD
        VLLM_STEP5_SHARD_SP_SHARED_EXPERT VLLM_TRITON_FORCE_FIRST_CONFIG VLLM_TRITON_JIT_WARMUP_NUM_THREADS
        VLLM_TRITON_USE_TD VLLM_USE_AOT_COMPILE VLLM_USE_BREAKABLE_CUDAGRAPH VLLM_USE_BYTECODE_HOOK
        VLLM_USE_DEEP_GEMM VLLM_USE_DEEP_GEMM_E8M0 VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES VLLM_USE_FLASHINFER_SAMPLER
        VLLM_USE_FUSED_MOE_GROUPED_TOPK VLLM_USE_LAYERNAME VLLM_USE_MEGA_AOT_ARTIFACT VLLM_USE_OINK_OPS
        VLLM_USE_STANDALONE_COMPILE VLLM_USE_TRITON_AWQ VLLM_XPU_ENABLE_XPU_GRAPH VLLM_XPU_FORCE_N_CONTIG_WEIGHT
        VLLM_XPU_USE_SAMPLER_KERNEL VLLM_ZENTORCH_WEIGHT_PREPACK
    """,
}

NEUTRAL_OPTIONS = frozenset(" ".join(_OPTIONS.values()).split())
NEUTRAL_VARIABLES = frozenset(" ".join(_VARIABLES.values()).split())
# The value that counts as not set, in all releases, for options whose default differs in meaning between them.
DEFAULTS: dict[str, object] = {}
