"""What each family of audio models needs, one entry per family. All other code treats them alike.

    family = family_of(config, folder)      # InputError for a model that is not supported
    family.tokens(3000)                     # audio tokens of 30 s

The families have this in common, so it has no column here. The encoder reads log-mel frames of
10 ms from WhisperFeatureExtractor. `config.audio_token_id` is the placeholder of an audio token,
S_audio. The decoder is `model.language_model`, and its attention function is set through
`text_config`. Positions count the tokens that are not padding. The head is `lm_head`, without a
bias, and nothing follows it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from attention import layer_masses
from data import InputError


class Family(NamedTuple):
    """One family. A clip has F mel frames and becomes audio tokens j = 0, 1, …"""

    name: str  # for messages
    model_class: str  # of transformers: the model that is trained
    # Number of audio tokens of a clip with F frames, as the encoder makes them.
    tokens: Callable[[int], int]
    # The first frame that audio token j stands for.
    first_frame: Callable[[int], int]
    # Keyword argument of the forward for the mask of frames, [clips, F]; None: it takes none.
    mask: str | None
    # The encoder takes one window, of the feature extractor's chunk_length (30 s on the hub).
    # Shorter clips are padded, longer ones refused. Otherwise clips may have any length.
    one_window: bool = False
    # Where get_audio_features puts what the decoder reads; None: see model.audio_embeddings.
    embeddings: str | None = "last_hidden_state"
    # The checkpoints on the hub hold this model, of which model_class is the thinker.
    whole_class: str | None = None
    # The encoder pads chunks of 1 s to the longest chunk of the batch. So clips get at least 1 s.
    pads_to_a_second: bool = False
    least_tokens: int = 1  # of a clip; a shorter clip is refused


# Keys: model_type of the config. A convolution with stride 2 makes ⌈F/2⌉ of F frames.
FAMILIES = {
    "qwen3_omni_moe_thinker": Family(
        "Qwen3-Omni", "Qwen3OmniMoeThinkerForConditionalGeneration",
        # Three such convolutions on chunks of 100 frames: 13 tokens, the last one of 4 frames.
        tokens=lambda frames: 13 * (frames // 100) + -(-(frames % 100) // 8),
        first_frame=lambda j: 100 * (j // 13) + 8 * (j % 13),
        mask="feature_attention_mask", pads_to_a_second=True,
        whole_class="Qwen3OmniMoeForConditionalGeneration"),
    "qwen2_5_omni_thinker": Family(
        "Qwen2.5-Omni", "Qwen2_5OmniThinkerForConditionalGeneration",
        tokens=lambda frames: -(-frames // 2) // 2,  # one convolution, then pairs
        first_frame=lambda j: 4 * j, mask="feature_attention_mask",
        whole_class="Qwen2_5OmniForConditionalGeneration"),
    "qwen2_audio": Family(
        "Qwen2-Audio", "Qwen2AudioForConditionalGeneration",
        tokens=lambda frames: -(-frames // 2) // 2, first_frame=lambda j: 4 * j,
        mask="feature_attention_mask", one_window=True, embeddings=None,
        least_tokens=2),  # its forward takes a single placeholder for one that is not yet repeated
    "audioflamingo3": Family(
        "AudioFlamingo3", "AudioFlamingo3ForConditionalGeneration",
        tokens=lambda frames: -(-frames // 2) // 2, first_frame=lambda j: 4 * j,
        mask="input_features_mask", one_window=True, embeddings="pooler_output"),
    "voxtral": Family(
        "Voxtral", "VoxtralForConditionalGeneration",
        tokens=lambda frames: 375,  # of the whole window, silence included; groups of four
        first_frame=lambda j: 8 * j, mask=None, one_window=True, embeddings="pooler_output"),
    "glmasr": Family(
        "GLM-ASR", "GlmAsrForConditionalGeneration",
        tokens=lambda frames: -(-frames // 2) // 4,  # one convolution, then groups of four
        first_frame=lambda j: 8 * j, mask="input_features_mask", one_window=True,
        embeddings="pooler_output"),
}


def family_of(config, where):
    """The Family of a model's config (a thinker's, not the whole Omni model's).

    Raises InputError, which begins with `where`, for a model that is not supported. It says which
    model that is, and what supporting it would take.
    """
    kind, text = config.model_type, config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    has = {name: getattr(config, name, None) is not None
           for name in ("audio_config", "audio_token_id", "vision_config")}
    if not has["audio_config"] and not has["audio_token_id"]:
        sort = "a text-only model"
        if has["vision_config"]:
            sort = ("a vision model, which would need its own positions of images and its "
                    "mm_token_type_ids in model.py")
        raise InputError(f"{where}: {kind} is {sort}; give an audio language model: {_names()}")
    if softcap is not None:
        raise InputError(f"{where}: the head of {kind} has a final_logit_softcapping of {softcap}, "
                         "which is not supported: log-probs would be wrong; model.logit_block and "
                         f"TokenStatistics would have to apply it. Supported are {_names()}")
    if kind not in FAMILIES:
        needs = "an entry in families.py, tested against eager attention and its own processor"
        if text is config:
            needs += ("; and its decoder has no text_config, so our attention function would have "
                      "to be set in another way: by itself it would silently keep sdpa")
        raise InputError(f"{where}: {kind} is not supported; supported are {_names()}. It would "
                         f"need {needs}")
    if not has["audio_token_id"]:
        raise InputError(f"{where}: no audio_token_id; copy config.json from the original "
                         "checkpoint")
    return FAMILIES[kind]


@torch.no_grad()
def check_decoder(policy, ids):
    """Every decoder layer goes through our attention, and the logits are lm_head's alone.

    Both are tried on a few tokens of text, `ids`. Raises InputError: a layer that keeps another
    attention function would give no audio mass, and a bias, softcap or scale would make log-probs
    wrong.
    """
    base, kind = policy.base, policy.base.config.model_type
    row = torch.tensor([ids], device=policy.device)  # [1, S]
    ones = torch.ones_like(row)
    if base.lm_head.bias is not None:
        raise InputError(f"{kind}: lm_head has a bias, which is not supported: log-probs would be "
                         "wrong; model.logit_block and TokenStatistics would have to add it")
    layers, made = tuple(range(policy.num_layers)), []
    hook = base.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output))
    try:
        output = base(input_ids=row, attention_mask=ones, position_ids=ones.cumsum(1) - 1,
                      use_cache=False, output_attentions=True, mass_layers=layers,
                      mass_keys=row == policy.audio_token_id)
    finally:
        hook.remove()
    layer_masses(output.attentions, layers)
    logits = output.logits  # [1, S, V]
    if not made or not torch.equal(made[0].to(logits), logits):
        raise InputError(f"{kind}: the model changes the logits after lm_head (by a softcap or a "
                         "scale), which is not supported: log-probs would be wrong; "
                         "model.logit_block and TokenStatistics would have to do the same")


def _names():
    """The names of all families, for messages."""
    *names, last = [family.name for family in FAMILIES.values()]
    return f"{', '.join(names)} and {last}"
