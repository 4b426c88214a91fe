"""MAPO in TRL: a GRPOTrainer with the relevance mask and, for audio models, the attention loss.

    # PYTHONPATH holds the repository and its examples/; TRL 1.16 (bench/requirements.txt)
    trainer = MapoTrainer(
        folder, [accuracy, format], GRPOConfig(beta=0.002, loss_type="grpo",
                                               use_bias_correction_kl=False), train_dataset=rows,
        processing_class=tokenizer, feature_extractor=extractor, mapo={"eta": 0.1})
    trainer.train()

The dataset's columns:
    prompt       x, as TRL takes it: a string or messages. For an audio model it renders one audio
                 placeholder.
    text_prompt  x_text: the same without the audio
    audio        the path of the clip; only for an audio model

The first reward function is r_acc, which the attention loss reads. `mapo` holds settings of
MapoConfig; ϵ, β and G are TRL's epsilon, beta and num_generations.

What differs from train.py:
    - Â is TRL's, with ε = 1e-4.
    - π_text-ref is TRL's frozen reference model. It makes one more forward per generation batch, on
      text_prompt, because TRL's own forward of it gives no entropy and hears the audio.
    - A completion that TRL empties (mask_truncated_completions) counts as 0 in the mean over
      completions, as in TRL. In mapo.py it does not count.
    - Completions come from transformers' generate: no vLLM. No PEFT, no images.
TRL itself does not pass audio to a model. The methods below do, one clip per prompt.
Tested on CPUs in fp32, one process, with tiny models of the Qwen3 and Qwen2-Audio classes.
"""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, pad

from attention import layer_masses  # the import also registers the function "audio_mass"
from data import load_clip, log_mel
from families import family_of
from mapo import MapoConfig, audio_attention_mass, differential_entropy, mapo_loss
from pos_gate import pos_gate_batch

# Settings of GRPOConfig that would change the loss or the samples in ways that this file ignores.
NEEDED = {"loss_type": "grpo", "importance_sampling_level": "token", "delta": None,
          "use_bias_correction_kl": False, "epsilon_high": None, "top_entropy_quantile": 1.0,
          "off_policy_mask_threshold": None, "entropy_coef": 0.0, "use_adaptive_entropy": False,
          "sync_ref_model": False, "use_vllm": False, "use_transformers_continuous_batching": False,
          "remove_unused_columns": False}


class MapoTrainer(GRPOTrainer):
    """See the top of the file. target_layers: L_tgt, 0-based; None is the last five.

    Raises ValueError naming a setting, an argument or a column that is missing or does not fit.
    """

    def __init__(self, *args, mapo=None, feature_extractor=None, target_layers=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mapo = MapoConfig(**(mapo or {}), clip_ratio=self.args.epsilon, beta=self.beta,
                               group_size=self.num_generations, advantage_eps=1e-4)
        self.feature_extractor, self.clips = feature_extractor, {}
        config = self.model.config
        self.audio_token_id = getattr(config, "audio_token_id", None)
        self._check()
        # TRL patched this forward for log-probs alone.
        add_fused_lm_head(self.ref_model, temperature=self.temperature,
                          cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
                          outputs=("log_probs", "entropy"))
        if self.audio_token_id is not None:  # a sampled placeholder would ask for another clip
            kinds = (getattr(config, f"{k}_token_id", None) for k in ("audio", "image", "video"))
            self.generation_config.suppress_tokens = [
                *(self.generation_config.suppress_tokens or []),
                *(token for token in kinds if token is not None)]
        if self.mapo.eta > 0:
            layers = config.get_text_config().num_hidden_layers
            self.target_layers = tuple(target_layers or range(max(0, layers - 5), layers))
            if not set(self.target_layers) <= set(range(layers)):
                raise ValueError(f"target_layers is {self.target_layers}: the model has the layers "
                                 f"0 to {layers - 1}")
            self.model.set_attn_implementation({"text_config": "audio_mass"})
            # The forward that TRL patched drops the decoder's attentions, which are the masses.
            self.model.base_model.register_forward_hook(
                lambda module, inputs, output: setattr(self, "head_mass", output.attentions))

    def _check(self):
        """Raises the errors of the class."""
        wrong = [f"{name}={value!r} (it is {getattr(self.args, name)!r})"
                 for name, value in NEEDED.items() if getattr(self.args, name) != value]
        if self.aux_loss_enabled:
            wrong.append("router_aux_loss_coef=0.0")
        if wrong:
            raise ValueError(f"MapoTrainer needs GRPOConfig({', '.join(wrong)})")
        if self.ref_model is None:
            raise ValueError("MapoTrainer needs TRL's reference model, its π_text-ref: set beta "
                             "above 0 in GRPOConfig, and train without PEFT")
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise ValueError("processing_class must be the tokenizer; pass the rest of the "
                             "processor as feature_extractor")
        columns = {"prompt", "text_prompt"}
        if self.audio_token_id is not None:
            columns.add("audio")
            if self.feature_extractor is None:
                raise ValueError("feature_extractor is missing: an audio model needs it for clips")
            self.family = family_of(self.model.config, "model")
            if self.family.mask is None:
                raise ValueError(f"{self.family.name} takes no mask of frames, but this "
                                 "file needs one")
        elif self.mapo.eta > 0:
            raise ValueError(f"eta is {self.mapo.eta}, and {type(self.model).__name__} has no "
                             "audio_token_id: set mapo={\"eta\": 0} for a model without audio")
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {
            "eval_dataset": self.eval_dataset}
        for name, rows in {"train_dataset": self.train_dataset, **held_out}.items():
            if rows is None:
                continue
            # A streamed data set may not know its columns before the first row.
            missing = columns - set(rows.column_names or next(iter(rows)))
            if missing:
                raise ValueError(f"{name} lacks the column {', '.join(sorted(missing))}")

    # ──────── a generation batch: what the loss needs besides TRL's tensors ────────

    def _generate_and_score_completions(self, inputs):
        if self.audio_token_id is not None:
            self.clips = self._load_clips(inputs)
        out = super()._generate_and_score_completions(inputs)
        clips, self.clips = self.clips, {}  # π_text-ref hears nothing
        ids, mask = out["completion_ids"], out["completion_mask"]  # [B, T]
        text_ids = [torch.tensor(x) for x in
                    super()._tokenize_prompts([row["text_prompt"] for row in inputs])[0]]
        text_mask = pad([torch.ones_like(x) for x in text_ids], 0, "left").to(ids.device)
        text_ids = pad(text_ids, self._tokenizer.pad_token_id, "left").to(ids.device)
        with torch.no_grad():
            _, out["text_ref_entropy"], _ = self._get_per_token_logps_and_entropies(
                self.ref_model, torch.cat([text_ids, ids], dim=1),
                torch.cat([text_mask, mask], dim=1), ids.shape[1],
                self.args.per_device_train_batch_size)
        if self.mapo.eta > 0:
            first = self.accelerator.process_index * len(ids)
            out["accuracy_reward"] = self.accuracy_reward[first:first + len(ids)]
            gates, _ = pos_gate_batch([row[m].tolist() for row, m in zip(ids, mask.bool())],
                                      self._tokenizer)
            out["pos_gate"] = torch.zeros_like(ids)
            out["pos_gate"][mask.bool()] = torch.tensor(sum(gates, []), device=ids.device)
        return {**out, **clips}  # TRL shuffles and splits them like its own tensors

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)  # [completions of all processes, functions]
        self.accuracy_reward = rewards[:, 0]
        return rewards

    def _load_clips(self, rows):
        """→ input_features [B, mel bins, F] and the mask of their frames [B, F]."""
        family, extractor = self.family, self.feature_extractor
        mels = {path: log_mel(load_clip(Path(path), extractor, family), extractor, family)
                for path in {row["audio"] for row in rows}}
        features = [mels[row["audio"]][0].T for row in rows]  # [F, mel bins] each
        counts = torch.tensor([mels[row["audio"]][1] for row in rows])
        features = pad(features).transpose(1, 2)  # [B, mel bins, F]
        mask = (torch.arange(features.shape[2]) < counts[:, None]).long()
        return {"input_features": features.to(self.accelerator.device),
                family.mask: mask.to(self.accelerator.device)}

    def _tokenize_prompts(self, prompts):
        """TRL's method. The placeholder of a clip is repeated for each of its audio tokens."""
        all_ids, images, _ = super()._tokenize_prompts(prompts)
        if not self.clips:
            return all_ids, images, {}
        expanded = []
        for ids, frames in zip(all_ids, self.clips[self.family.mask].sum(dim=1).tolist()):
            if ids.count(self.audio_token_id) != 1:
                raise ValueError(f"a prompt renders {ids.count(self.audio_token_id)} audio "
                                 f"placeholders (id {self.audio_token_id}); it must be one")
            at = ids.index(self.audio_token_id)
            count = self.family.tokens(frames)
            expanded.append(ids[:at] + [self.audio_token_id] * count + ids[at + 1:])
        return expanded, images, self.clips

    # ──────── the loss ────────

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep,
                                           batch_size=None, **_):
        """TRL's method, which takes images, with self.clips in their place."""
        parts = [self._forward(model, input_ids[rows], attention_mask[rows], logits_to_keep,
                               {name: x[rows] for name, x in self.clips.items()})
                 for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids))]
        logp, entropy = (torch.cat(x) for x in zip(*parts))
        return logp, entropy, None

    def _forward(self, model, ids, attention_mask, length, arguments):
        """→ log π(y_t) and H(π(·|y_<t, x)) of the completions, [B, T] each; length is T."""
        labels = ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-length] = -100  # only completions are scored
        with self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=attention_mask, labels=labels,
                        fused_lm_head=True, **arguments)
        return out.log_probs[:, -length:], out.entropy[:, -length:]

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # [B, P+T]
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]  # T
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # [B, T]
        arguments = {}
        if self.audio_token_id is not None:
            arguments = {name: inputs[name] for name in ("input_features", self.family.mask)}
        if self.mapo.eta > 0:  # they reach attention.attention_with_mass
            arguments |= {"output_attentions": True, "mass_layers": self.target_layers,
                          "mass_first_row": ids.shape[1] - length - 1,  # it predicts y_1
                          "mass_keys": ids == self.audio_token_id}
        logp, entropy = self._forward(model, ids, attention_mask, length, arguments)
        audio_mass = None
        if self.mapo.eta > 0:  # the last position, y_T, predicts nothing
            masses = layer_masses(self.head_mass, self.target_layers)  # [L, B, H, T+1]
            audio_mass = audio_attention_mass(masses[..., :length])
            self.head_mass = None  # frees the graph after the backward
        parts = mapo_loss(
            logp=logp, old_logp=inputs.get("old_per_token_logps"),
            ref_logp=inputs["ref_per_token_logps"], advantages=inputs["advantages"], mask=mask,
            delta_h=differential_entropy(inputs["text_ref_entropy"], entropy),
            audio_mass=audio_mass, pos_gate=inputs.get("pos_gate"),
            accuracy_reward=inputs.get("accuracy_reward"), config=self.mapo)
        mode = "train" if self.model.training else "eval"
        logged = {"omega_max": parts["omega"].max(), "policy_loss": parts["policy_loss"],
                  "kl_loss": parts["kl_loss"], "attention_loss": parts["attention_loss"]}
        for name, value in logged.items():
            self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())
        # A mean over all rows, as TRL's, so that the micro-batches of a step add up.
        loss = parts["loss"] * mask.any(dim=1).sum() / len(mask)
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)
