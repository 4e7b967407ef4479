"""Exports on vLLM: ``vllm serve EXPORT`` finds this plugin by its entry point (group ``vllm.general_plugins``)."""

from __future__ import annotations

# What the plugin calls of vLLM's internals was tested with these releases.
TESTED = ("0.32.0",)
# Families whose graft on vLLM writes what `generate()` writes; where vLLM has no model of its own, it runs the layers
# as transformers has them.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "olmo2",
    "olmo3",
    "seed_oss",
    "smollm3",
    "ministral3",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "lfm2",
)
# Of the others: why not.
REFUSED = {
    "qwen3_5_text": "vLLM computes its recurrent layers on CPUs in bfloat16 alone, where tokens cannot be compared",
}
# What vLLM's model of a family takes for granted and does not read: key of config.json -> the only value.
TAKEN_FOR_GRANTED = {
    "lfm2": {"tie_word_embeddings": True},
    "olmoe": {"clip_qkv": None},
    "gpt_oss": {
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters.rope_type": "yarn",
        "rope_parameters.attention_factor": None,
        "rope_parameters.mscale": None,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
}


def register() -> None:
    """Tell vLLM of PHOTON models; called by vLLM in each of its processes.

    Raises:
        RuntimeError: for a release of vLLM other than those that were tested, whose internals may have moved.
    """
    from vllm import ModelRegistry

    check_version(_installed())
    # With it vLLM reads the exports' config.json without their code.
    import photon_train.models  # noqa: F401

    from . import hybrids, specs

    specs.register()
    ModelRegistry.register_model("PhotonForCausalLM", "photon_vllm.model:PhotonForCausalLM")
    hybrids.register()


def check_version(installed: str) -> None:
    """See `register`; builds for a device (``0.32.0+cpu``) count as their release."""
    if installed.split("+")[0] not in TESTED:
        raise RuntimeError(
            f"photon-train's plugin was tested with vLLM {', '.join(TESTED)}, and {installed} is installed: install "
            "that, or to serve other models leave the plugin out with VLLM_PLUGINS= and the plugins that you need"
        )


def _installed() -> str:
    import vllm

    return vllm.__version__
