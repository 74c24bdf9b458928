"""What the speed scripts share: fair timing, and one text GRPO step put together from the package's parts."""
import statistics
import time
from typing import Callable

import torch
from torch import Tensor

from unify_rl.grpo.advantage import advantages
from unify_rl.grpo.objective import objective, token_weights
from unify_rl.mechanisms.tokens import encode_prefix, sample_tokens, states_before, token_logp


def options(parser, repeats: int):
    "The options of every script, parsed; `clock` becomes the function to time with."
    parser.add_argument("--repeats", type=int, default=repeats, help=f"interleaved repetitions (default: {repeats})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="'cpu' counts CPU seconds: for one thread on a busy machine")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    a.about = f"{a.repeats} interleaved repetitions, {a.clock} time, {machine()}"
    a.clock = dict(wall=time.perf_counter, cpu=time.process_time)[a.clock]
    return a


def timed(job: Callable, clock: Callable) -> float:
    "Seconds that one call takes."
    start = clock()
    job()
    return clock() - start


def interleave(jobs: dict[str, Callable], repeats: int, clock: Callable) -> dict[str, list[float]]:
    "Time all jobs in turn, A B A B ..., after one untimed round, so that a slow minute of the machine hits all alike."
    for job in jobs.values(): job()
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items(): seconds[name].append(timed(job, clock))
    return seconds


def ratio(slow: list[float], fast: list[float]) -> str:
    "Median of the ratios of neighbouring runs, with their range."
    r = sorted(a / b for a, b in zip(slow, fast))
    return f"{statistics.median(r):.2f} (from {r[0]:.2f} to {r[-1]:.2f})"


def machine() -> str:
    import os
    import transformers
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{threads}, torch {torch.__version__}, transformers {transformers.__version__}"


def small_llama(vocabulary: int, hidden: int, layers: int, heads: int, context: int, **ids):
    "A Llama with random weights."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
                                        num_hidden_layers=layers, num_attention_heads=heads,
                                        max_position_embeddings=context, **ids))


def grpo_step(model, optimizer, ids_NP: Tensor, mask_NP: Tensor, group_size: int, length: int,
              reward: Callable, generator: torch.Generator) -> float:
    "Sample, score, compare, update: one on-policy GRPO step without a reference; returns the mean reward."
    body, head, embed = model.model, model.lm_head, model.model.embed_tokens
    with torch.no_grad():
        s = sample_tokens(body, encode_prefix(body, embed(ids_NP), mask_NP), group_size, embed, head, length, generator)
    scores_B = torch.as_tensor(reward(s.tokens_BT), dtype=torch.float64)
    adv = advantages(scores_B[None], torch.ones(1), group_size)
    index_B = torch.arange(len(ids_NP)).repeat_interleave(group_size)
    states = states_before(body, encode_prefix(body, embed(ids_NP), mask_NP), index_B, embed(s.tokens_BT))
    loss, _ = objective(token_logp(states, head, s.tokens_BT), s.logp_BT, None, token_weights(s.mask_BT), adv.adv_B)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(scores_B.mean())
