"""A GRPO generation batch on a tiny text model: ours and TRL's GRPOTrainer.

    python bench/trl_step.py

The model is of Qwen3's class, with random weights: 4 layers, D = 128, V = 16,384. Both sample 32
tokens for 16 prompts of 64 tokens with G = 8, in the trainer's process, at temperature 1 without
top-k and top-p (such a model produces an EOS once in 16,384 tokens). Both make 4 optimizer steps of
32 completions, one micro-batch each, with AdamW, β = 0.002 and no checkpointing. The reward is the
length of the text.

    generate   until the token ids of the completions exist (ours: train.generate; TRL:
               GRPOTrainer._generate)
    update     everything else: rewards, π_old and π_ref of 128 completions, 4 updates, metrics

Each runs in a fresh process, generation batches in turn; the numbers are medians. The first
generation batch of each is left out.
"""

import tempfile
import time

import measure
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import train
from config import TrainConfig
from data import Prompt, Question
from distributed import Team
from mapo import group_advantages
from model import Policy
from rollout import GenerationBatch, rows_of_step
from run import Run, make_optimizer, make_reference

VOCABULARY, PROMPTS, LENGTH, GROUP, NEW, STEPS = 16_384, 16, 64, 8, 32, 4


def main():
    flags = measure.options(__doc__, device=False).parse_args()
    result = measure.compare(("ours", "TRL"), prepare, flags.rounds, flags.threads)
    print(f"{measure.machine(flags.threads, 'trl')}, medians of {flags.rounds} "
          "interleaved rounds\n")
    theirs = result["TRL"][0]
    measure.table(
        ["128 completions of 32 tokens", "generate, s", "/ TRL", "update, s", "/ TRL"],
        [[name, f"{s['generate']:.2f}", f"{s['generate'] / theirs['generate']:.2f}",
          f"{s['update']:.2f}", f"{s['update'] / theirs['update']:.2f}"]
         for name, (s, _) in result.items()])


def prepare(name):
    generation_batch = {"ours": ours, "TRL": trl}[name]()
    generation_batch()  # the first one is left out
    return generation_batch


# ──────── the model, the same for both ────────


def text_model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
        eos_token_id=0, pad_token_id=1, bos_token_id=None)).eval()


def word_tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1",
                                   padding_side="left")


def prompt_ids():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (PROMPTS, LENGTH), generator=generator).tolist()


class TextPolicy(Policy):
    """Our policy around a language model without an audio encoder."""

    def __init__(self, model):
        model.config.audio_token_id = 2  # a token that the sampler bans
        super().__init__(model, word_tokenizer(), None)

    def _audio(self, prompts, ids):
        return {}


def text_prompt(name, ids, text_ids):
    """Token ids, with and without those that count as audio → Prompt"""
    return Prompt(Question(name, (), "", (), ""), ids, text_ids, (), ())


# ──────── ours ────────


def ours():
    policy = TextPolicy(text_model())
    config = TrainConfig(
        mask=False, eta=0.0, group_size=GROUP, generation_batch_size=PROMPTS * GROUP,
        steps_per_generation=STEPS, micro_batch_size=PROMPTS * GROUP // STEPS,
        micro_batch_tokens=0, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
        gradient_checkpointing=False)
    run = Run(config, Team(), policy, make_reference(policy, config), [], [],
              *make_optimizer(policy, config))
    prompts = [text_prompt(str(i), ids, ids) for i, ids in enumerate(prompt_ids())]
    iteration = 0

    def generation_batch():
        nonlocal iteration
        started = time.perf_counter()
        completions, version, speed = train.generate(prompts, iteration, run)
        generated = time.perf_counter()
        batch = GenerationBatch([prompt for prompt in prompts for _ in range(GROUP)], completions,
                                version, speed)
        batch.texts = [policy.decode(c) for c in completions]
        reward = torch.tensor([float(len(text)) for text in batch.texts])
        batch.rewards = dict.fromkeys(("accuracy", "format", "consistency", "total"), reward)
        batch.advantages = group_advantages(reward, GROUP, config.advantage_eps)
        batch.pos_gates = [[1] * len(c.token_ids) for c in completions]  # GRPO does not use them
        batch.pos_fallbacks = [0] * len(completions)
        batch.unreadable = [False] * len(completions)
        train.reference_passes(batch, run)
        # The steps of the second iteration: the first step of a run always measures a_t.
        for step in range(STEPS + 1, 2 * STEPS + 1):
            train.update(batch, rows_of_step(step, config), step, run)
        iteration += 1
        return {"generate": generated - started, "update": time.perf_counter() - generated}
    return generation_batch


# ──────── TRL ────────


def trl():
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.setdefault("begin", time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            clock["end"] = time.perf_counter()

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            started = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            clock["generate"] = clock.get("generate", 0) + time.perf_counter() - started
            return result

    folder = tempfile.mkdtemp()  # TRL loads π_ref from the folder that holds the policy
    text_model().save_pretrained(folder)
    config = GRPOConfig(
        output_dir=folder, model_init_kwargs={"dtype": "float32"}, use_cpu=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=PROMPTS * GROUP // STEPS,
        gradient_accumulation_steps=1, steps_per_generation=STEPS, num_generations=GROUP,
        max_completion_length=NEW, temperature=1.0, top_k=0, top_p=1.0, beta=0.002,
        loss_type="grpo", max_steps=STEPS, learning_rate=1e-6, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True)
    tokenizer = word_tokenizer()
    data = Dataset.from_list([{"prompt": tokenizer.decode(ids)} for ids in prompt_ids()])
    trainer = TimedTrainer(
        folder, lambda completions, **_: [float(len(text)) for text in completions], config, data,
        processing_class=tokenizer, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)

    def generation_batch():
        clock.clear()
        trainer.train()
        return {"generate": clock["generate"],
                "update": clock["end"] - clock["begin"] - clock["generate"]}
    return generation_batch


if __name__ == "__main__":
    main()
