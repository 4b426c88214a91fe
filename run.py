"""What a run needs before line 1 of Algorithm 1: checked inputs, models, optimizer and servers.

    with join(config) as team, open_run(config, team) as run:
        ...   # run.policy, run.reference, run.optimizer, run.questions, run.server, …

Everything a user can get wrong is checked here, before anything is written.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup

from checkpoint import (add_lora, check_folder, load_policy, remove_numbered, resume,
                        save_checkpoint, save_policy, save_state)
from config import TrainConfig, vllm_python
from data import InputError, clip_tokens, raise_bad_rows, read_avqa, read_questions
from distributed import Team, fill, launch, shard
from families import check_decoder
from metrics import check_output_dir, remove_run
from model import Policy, audio_embeddings
from rewards import CheckerError, check_consistency
from rollout import check_push, push_weights
from server import Command, Server


@dataclass
class Run:
    """What Algorithm 1 works with. `reference()` is a context that yields the frozen π_ref."""

    config: TrainConfig
    team: Team
    policy: Policy  # π_θ
    reference: Callable  # π_ref, and without audio π_text-ref
    questions: list
    eval_questions: list
    optimizer: torch.optim.Optimizer = None
    schedule: object = None
    rows: dict = None  # hashes of the questions: a state resumes only with the same ones
    steps_done: int = 0  # optimizer steps, including those before a resume
    unfinished: dict = None  # fields of the generation batch that a resumed run continues with
    server: Server = None  # of the rollouts; rank 0 alone has it
    checker: Server = None
    # One thread samples ahead (async_rollouts), the other asks the checker.
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))
    ahead: tuple = None  # the sampling that async_rollouts started for the next iteration
    checks: int = 0  # comparisons of log-probs after a push
    flat_batches: int = 0  # generation batches in a row whose advantages are all 0
    stop: threading.Event = field(default_factory=threading.Event)  # set by SIGTERM
    over: threading.Event = field(default_factory=threading.Event)  # the checker's thread gives up


@contextlib.contextmanager
def open_run(config, team):
    """Reads and checks the inputs, loads the models, resumes, starts the servers → Run.

    Raises InputError before anything is written. With `overwrite`, the run that output_dir holds
    is removed after all checks.
    """
    questions, eval_questions, policy, reference = open_inputs(config, team)
    run = Run(config, team, policy, reference, questions, eval_questions)
    run.rows = team.broadcast({"data": rows_digest(questions), "eval_data":
                               rows_digest(eval_questions)} if team.leads else None)
    run.optimizer, run.schedule = make_optimizer(policy, config)
    if config.resume:
        run.steps_done, run.unfinished = resume(run)
    if config.overwrite and team.leads:
        remove_run(Path(config.output_dir))
    with (stop_on_sigterm(run.stop),
          open_servers(config, policy, [*questions, *eval_questions], team) as servers):
        run.server, run.checker = servers
        exported = team.broadcast(checkpoint_folder(run).exists())
        if config.resume and export_is_due(run) and not exported:  # SIGTERM came before it
            save_checkpoint(policy, checkpoint_folder(run), team)
        try:
            yield run
        finally:
            run.over.set()
            run.pool.shutdown(wait=False, cancel_futures=True)


# ──────── inputs ────────


def open_inputs(config, team):
    """→ questions, eval questions, policy, reference, on every rank.

    In a team rank 0 reads and checks for all. It alone holds the whole weights, on its CPU, while
    it sends them. A single process with a GPU takes the same path. Raises InputError; writes
    nothing.
    """
    whole, questions, eval_questions = None, None, None
    if team.leads:
        check_settings(config)
        questions, eval_questions, whole = read_inputs(config)
    questions, eval_questions = team.broadcast((questions, eval_questions))
    if team.mesh is None:
        reference = make_reference(set_trainable(whole, config), config)
        whole.to(team.device)
        return questions, eval_questions, whole, reference
    frozen = None
    if not config.lora_rank:  # under LoRA the reference is the policy without its adapters
        frozen = load_policy(config.model, team.dtype or torch.float32, meta=True)
        frozen.fp32_head = config.fp32_head
        frozen = fill(shard(frozen.requires_grad_(False), team, team.dtype), whole, team).eval()
    if team.leads:
        set_trainable(whole, config)
    policy = narrow_frozen(set_trainable(load_policy(config.model, meta=True), config), team)
    policy = fill(shard(policy, team, team.dtype), whole, team)
    return questions, eval_questions, policy, make_reference(policy, config, frozen)


def check_settings(config):
    """Checks what a config alone can tell: paths, addresses, interpreters. Raises InputError."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty: give --{name}, or a recipe that sets it")
    check_folder(config.model)
    uses_checker = config.reward_weights[2] != 0
    is_url, is_rule = config.checker.startswith("http"), config.checker == "rule"
    is_folder = (Path(config.checker or "-") / "config.json").is_file()
    if uses_checker and not (is_url or is_rule or is_folder):
        raise InputError(f"checker is {config.checker!r}: give the URL of the consistency checker, "
                         "the folder of a model to start vLLM on, `rule`, or a λ_cons of 0")
    starts_rollouts = config.rollout == "vllm" and not config.vllm_url
    starts_checker = uses_checker and Path(config.checker).is_dir()
    if (starts_rollouts or starts_checker) and not vllm_python(config).is_file():
        raise InputError(f"vllm_python {vllm_python(config)}: no such interpreter; `make vllm` "
                         "builds the vLLM environment, see requirements-vllm.txt")
    flags = config.vllm_flags
    if config.fp32_head and "hf-overrides" in flags and "head_dtype" not in flags:
        raise InputError("vllm_flags: --hf-overrides without head_dtype would give the server "
                         'another head than the trainer; add "head_dtype": "float32", or set '
                         "fp32_head to false")
    if config.vllm_url and not config.vllm_url.startswith("http"):
        raise InputError(f"vllm_url is {config.vllm_url!r}: give a URL, as http://127.0.0.1:8000")
    if config.vllm_url:
        Server(config.model, url=config.vllm_url)  # refuses an address without a key
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise InputError(f"report_to is {config.report_to}, which is not installed: pip install "
                         f"{config.report_to}")
    check_output_dir(config)
    if uses_checker and is_url:
        probe = {"think": "<think>2 is even.</think>even",
                 "reasoning": "<reasoning>2 is even.</reasoning><answer>even</answer>"}
        try:
            check_consistency([probe[config.format_style]], config)
        except CheckerError as error:
            raise InputError(f"checker: {error}") from error


def read_inputs(config):
    """→ questions, eval questions, and the policy with whole weights on the CPU."""
    if config.data_format == "avqa":
        questions = read_avqa(config.data, config.audio_root)
    else:
        questions = read_questions(config.data)
    eval_questions = read_questions(config.eval_data) if config.eval_data else []
    torch.manual_seed(config.seed)
    policy = load_policy(config.model)
    check_policy(policy, [*questions, *eval_questions], config.target_layers, config.instruction)
    return questions, eval_questions, policy


def check_policy(policy, questions, target_layers, instruction=""):
    """Checks the model against the questions before anything is trained or generated.

    L_tgt must exist. No question may contain a control token, and its clips must fit the model;
    the bad rows are listed together. For the first question the encoder must make as many audio
    tokens as the prompt has placeholders. Nor may the instruction contain a control token, other
    than format tags. Decoder and head must be what the losses take them for (check_decoder).
    Raises InputError.
    """
    raise_bad_rows("the questions", [error for question in questions
                                     if (error := _misfit(question, policy))])
    for layer in target_layers:
        if not 0 <= layer < policy.num_layers:
            raise InputError(f"target_layers: {layer} is out of range; the model has layers 0 to "
                             f"{policy.num_layers - 1}")
    if not target_layers or len(set(target_layers)) < len(target_layers):
        raise InputError(f"target_layers: {list(target_layers)}; give at least one layer, and each "
                         "only once")
    question = questions[0]
    prompt = policy.encode(question, instruction)
    batch = policy.collate([prompt], [[]]).to(policy.device)
    wanted = policy.audio_tokens(prompt)
    reason = ""
    try:
        with torch.no_grad():
            made = len(audio_embeddings(policy.base, policy.family, batch.audio))
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:  # from the encoders
        made, reason = "no", f" ({' '.join(str(error).split())[:200]})"
    if made != wanted:
        raise InputError(f"question {question.id}: the audio encoder makes {made} tokens{reason}, "
                         f"but the prompt has {wanted} placeholders; check n_window and the "
                         "feature extractor's hop length in the model folder")
    check_decoder(policy, prompt.text_ids[:3])


def _misfit(question, policy):
    """The InputError of a question that does not fit the model, or None."""
    where = f"{question.where}: " if question.where else ""
    where += f"question {question.id}"
    tokens = 0
    try:
        policy.refuse_control_tokens("", question=question.question,
                                     choices="\n".join(question.choices))
        for clip, samples in zip(question.audio, question.samples):
            tokens += clip_tokens(samples, policy.feature_extractor, policy.family, clip)
    except InputError as error:
        return InputError(f"{where}: {error}")
    most = policy.base.config.get_text_config().max_position_embeddings
    if tokens >= most:
        return InputError(f"{where}: its clips make {tokens} tokens, but the model takes {most} "
                          "(max_position_embeddings); cut the clips")
    return None


def rows_digest(questions):
    """A hash of questions, and of the names and sizes of their clips: the folder may move."""
    rows = [[q.id, q.question, q.choices, q.answer, q.domain,
             [[clip.name, clip.stat().st_size] for clip in q.audio]] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ──────── models and optimizer ────────


def set_trainable(policy, config):
    """Chooses the trained parameters, adds LoRA, turns checkpointing on. → policy, in place"""
    policy.requires_grad_(False)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha)
    else:
        policy.base.requires_grad_(True)
        frozen = ["visual"]  # the vision tower, which no forward runs
        if config.freeze_audio_tower:
            frozen += ["audio_tower", "multi_modal_projector"]
        for name in frozen:
            if hasattr(policy.base.model, name):
                getattr(policy.base.model, name).requires_grad_(False)
    policy.fp32_head = config.fp32_head
    if config.gradient_checkpointing:
        policy.base.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the inputs of all parts require gradients, which only reentrant
        # checkpointing needs. The backward would run through the frozen encoders.
        policy.base.disable_input_require_grads()
    return policy


def narrow_frozen(policy, team):
    """Frozen weights need no fp32 masters: bf16 is what the folder holds and what is gathered.

    → policy, changed in place
    """
    if policy.saved_dtype == team.dtype:
        for p in policy.parameters():
            if not p.requires_grad:
                p.data = p.data.to(team.dtype)
    return policy


def make_reference(policy, config, frozen=None):
    """→ a context manager that yields the frozen initial policy, π_ref and π_text-ref.

    Under LoRA that is the policy with its adapters disabled, without a copy. Otherwise it is
    `frozen`, or a copy made now.
    """
    if config.lora_rank:
        @contextlib.contextmanager
        def reference():
            with policy.model.disable_adapter():
                yield policy
        return reference
    if frozen is None:
        frozen = copy.deepcopy(policy).requires_grad_(False).eval()

    @contextlib.contextmanager
    def reference():
        yield frozen.to(policy.device)
        if config.offload_reference:
            frozen.to("cpu")
    return reference


def make_optimizer(policy, config):
    """AdamW, weight decay on matrices only, and a cosine schedule with warm-up."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
         {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        # The loop over single tensors, which is the default for DTensors, is five times slower.
        fused=isinstance(trained[0], DTensor))
    warmup = math.ceil(config.warmup_ratio * config.max_steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, config.max_steps)


# ──────── servers ────────


@contextlib.contextmanager
def open_servers(config, policy, questions, team):
    """Starts the vLLM servers that a run asks for → (rollout server or None, checker's or None).

    Only rank 0 of a team talks to them. Where a node serves, they run on that node.
    """
    folder, server, checker = Path(config.output_dir).resolve(), None, None
    in_flight = config.generation_batch_size // config.group_size  # all questions of a batch
    served = Path(config.model).resolve()
    is_thinker = policy.full_config is None and policy.family.whole_class
    if config.rollout == "vllm" and is_thinker:  # vLLM serves a thinker only in its whole model
        served = folder / "weights" / "version-0"
        save_policy(policy, served, team)
    with contextlib.ExitStack() as stack:
        if not team.leads:
            yield None, None
            return
        folder.mkdir(parents=True, exist_ok=True)  # for the servers' logs
        if config.rollout == "vllm":  # remove the pushed weights at the end
            stack.callback(remove_numbered, folder / "weights", "version")
        if config.rollout == "vllm" and config.vllm_url:
            server = stack.enter_context(Server(served, url=config.vllm_url,
                                                in_flight=in_flight))
        elif config.rollout == "vllm":
            command = Command(vllm_python(config), folder / "vllm.log", config.vllm_flags,
                              clips=max(len(q.audio) for q in questions),
                              sequences=config.generation_batch_size,
                              fp32_head=config.fp32_head)
            server = launch(stack, team, "rollout", served, command, in_flight=in_flight)
            if team.device.type == "cuda" and not team.node_serves:
                server.wait()  # vLLM takes our allocations meanwhile for its own
        if config.reward_weights[2] != 0 and Path(config.checker).is_dir():
            # They share the GPUs, and vLLM measures the free memory while it starts: one by one.
            if server and server.ours:
                server.wait()
            command = Command(vllm_python(config), folder / "checker.log", config.checker_flags)
            checker = launch(stack, team, "checker", Path(config.checker).resolve(), command,
                             weights_change=False, name=config.checker_model)
        yield server, checker


def update_server(run, iteration, prompts):
    """Gives the rollout server the weights of now, if it does not have them. → seconds

    Compares log-probs at the start, after the first push, and then every check_push_every
    iterations: a server that accepts a push may still have loaded it wrongly.
    """
    config, team = run.config, run.team
    if config.rollout == "local":
        return 0.0
    started = time.perf_counter()
    changed = team.broadcast(team.leads and run.server.version != run.steps_done)
    if changed:
        push_weights(run.server, run.policy, Path(config.output_dir) / "weights", run.steps_done,
                     team)
        team.gather(None)  # the others wait here for rank 0: NCCL would soon give up
    due = run.checks == 1 or iteration % config.check_push_every == 0
    if run.checks == 0 or changed and due:
        check_push(run.server, run.policy, prompts[:4], temperature=config.temperature,
                   max_gap=config.max_push_gap, seed=config.seed, team=team)
        run.checks += 1
    return time.perf_counter() - started


# ──────── between the steps ────────


@contextlib.contextmanager
def stop_on_sigterm(event):
    """SIGTERM sets the event: the run finishes its step, saves its state and ends."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def after_step(step, batch, run):
    """Saves the state and exports checkpoints when they are due. → True if the run must stop"""
    config, team, folder = run.config, run.team, Path(run.config.output_dir)
    # After the last step the run ends anyway, with its checkpoint.
    stopping = any(team.gather(run.stop.is_set())) and step < config.max_steps
    save_due = config.save_every and step % config.save_every == 0
    if step < config.max_steps and (stopping or save_due):
        unfinished = batch if step % config.steps_per_generation else None
        save_state(folder / "state", step, run, unfinished)
    if stopping:
        if team.leads:
            print(f"{config.output_dir}: stopped by SIGTERM after step {step}; --resume true "
                  "continues from there")
    elif export_is_due(run):
        save_checkpoint(run.policy, checkpoint_folder(run), team)
    return stopping


def export_is_due(run):
    """Does export_every ask for a checkpoint now? After max_steps it is checkpoint/ instead."""
    every, step = run.config.export_every, run.steps_done
    return every > 0 and step % every == 0 and step < run.config.max_steps


def checkpoint_folder(run):
    return Path(run.config.output_dir) / f"checkpoint-{run.steps_done}"
