"""A GRPO generation batch on a tiny text model: ours against TRL's GRPOTrainer doing the same work.

    python bench/trl_step.py

Qwen3's class, 4 layers, D = 128, V = 16,384, random weights; 16 prompts of 64 tokens, G = 8, 32 new tokens (the model
writes an EOS once in 16,384 tokens), sampled in the trainer's process at temperature 1 from the whole distribution; 4
optimizer steps of 32 completions, one micro-batch each; AdamW, β 0.002, no checkpointing; a reward of text length.
  generate   until the completions' token ids are there (ours: `rollout.sample`; TRL: `GRPOTrainer._generate`)
  update     the rest: rewards, π_old and π_ref of 128 completions, 4 updates, metrics
Each in a fresh process, batches in turn, medians; the first batch of each is left out.
"""

import tempfile
import time
from collections import defaultdict

import measure
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import train
from data import Question
from model import Policy, Prompt

VOCABULARY, PROMPTS, LENGTH, GROUP, NEW, STEPS = 16_384, 16, 64, 8, 32, 4


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1", padding_side="left")


def text_model():
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
                         eos_token_id=0, pad_token_id=1, bos_token_id=None)
    return Qwen3ForCausalLM(config).eval()


def prompt_ids():
    return torch.randint(3, VOCABULARY, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()


class TextPolicy(Policy):
    """Our policy around a language model without audio."""

    def _pad_features(self, prompts, ids):
        return {}


def ours():
    model, tok = text_model(), tokenizer()
    model.config.audio_token_id = 2  # never sampled, as no prompt has it
    policy = TextPolicy(model, tok, None)
    config = train.TrainConfig(mask=False, eta=0.0, group_size=GROUP, generation_batch_size=PROMPTS * GROUP,
                               steps_per_generation=STEPS, micro_batch_size=PROMPTS * GROUP // STEPS, temperature=1.0,
                               top_k=0, top_p=1.0, max_new_tokens=NEW, gradient_checkpointing=False)
    prompts = [Prompt(Question(str(i), (), "", (), ""), ids, ids, (), ()) for i, ids in enumerate(prompt_ids())]
    reference = train.make_reference(policy, config)
    optimizer, _ = train.make_optimizer(policy, config)
    iteration = 0

    def run():
        nonlocal iteration
        started = time.perf_counter()
        completions, version, speed = train.generate(policy, prompts, config, iteration, None)
        generated = time.perf_counter()
        batch = train.GenerationBatch([p for p in prompts for _ in range(GROUP)], completions, version, speed, 0.0)
        batch.texts = [policy.text(c) for c in completions]
        reward = torch.tensor([float(len(text)) for text in batch.texts])
        batch.rewards = {"accuracy": reward, "format": reward, "consistency": reward, "total": reward}
        batch.advantages = train.group_advantages(reward, GROUP, config.advantage_eps)
        batch.pos_gates = [[1] * len(c.token_ids) for c in completions]
        batch.pos_fallbacks = [0] * len(completions)
        train.freeze(batch, policy, reference, config, defaultdict(float))
        size = config.generation_batch_size // STEPS
        for step in range(STEPS):
            train.update(policy, optimizer, batch, range(step * size, (step + 1) * size), config, measure=False)
        iteration += 1
        return {"generate": generated - started, "update": time.perf_counter() - generated}
    return run


def trls():
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.setdefault("begin", time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            clock["end"] = time.perf_counter()

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            started = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            clock["generate"] = clock.get("generate", 0) + time.perf_counter() - started
            return result

    folder = tempfile.mkdtemp()  # TRL loads π_ref from the folder that the policy came from
    text_model().save_pretrained(folder)
    config = GRPOConfig(output_dir=folder, model_init_kwargs={"dtype": "float32"}, use_cpu=True, bf16=False,
                        gradient_checkpointing=False,
                        per_device_train_batch_size=PROMPTS * GROUP // STEPS, gradient_accumulation_steps=1,
                        steps_per_generation=STEPS, num_generations=GROUP, max_completion_length=NEW, temperature=1.0,
                        top_k=0, top_p=1.0, beta=0.002, loss_type="grpo", max_steps=STEPS, learning_rate=1e-6,
                        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
    tok = tokenizer()
    data = Dataset.from_list([{"prompt": tok.decode(ids)} for ids in prompt_ids()])
    trainer = Timed(folder, lambda completions, **_: [float(len(text)) for text in completions], config, data,
                    processing_class=tok, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)

    def run():
        clock.clear()
        trainer.train()
        return {"generate": clock["generate"], "update": clock["end"] - clock["begin"] - clock["generate"]}
    return run


def prepare(name):
    run = {"ours": ours, "TRL": trls}[name]()
    run()
    return run


def main():
    flags = measure.options(__doc__, device=False).parse_args()
    result = measure.compare(("ours", "TRL"), prepare, flags.rounds, flags.threads)
    print(f"{measure.machine(flags.threads, 'trl')}, medians of {flags.rounds} interleaved repeats\n")
    theirs = result["TRL"][0]
    measure.table(["128 completions of 32 tokens", "generate, s", "/ TRL", "update, s", "/ TRL"],
                  [[name, f"{s['generate']:.2f}", f"{s['generate'] / theirs['generate']:.2f}", f"{s['update']:.2f}",
                    f"{s['update'] / theirs['update']:.2f}"] for name, (s, _) in result.items()])


if __name__ == "__main__":
    main()
