"""One text GRPO step: this package's parts against TRL's GRPOTrainer, at equal work.

    python tests/benchmarks/text_step.py

Equal: Llama configuration and first weights, prompts, outputs of a fixed length, reward on decoded text,
advantages by mean and standard deviation, no reference (beta 0), clipping, AdamW, gradient clipping,
one update a rollout, no activation checkpointing.
The two take steps in turn. TRL also logs entropies and completions; that is part of its step.
"""
import argparse
import copy
import tempfile
import warnings
from statistics import median

import torch

from common import grpo_step, options, ratio, small_llama, timed
from unify_rl.core import rng_for
from unify_rl.policies.janus import word_tokenizer


def reward(texts: list[str]) -> list[float]:
    "Share of the words that are 'w7' to 'w9'."
    return [sum(w in ("w7", "w8", "w9") for w in t.split()) / max(len(t.split()), 1) for t in texts]


def take_turns(model, tokenizer, prompts: list[str], G: int, length: int, lr: float, repeats: int, clock, ours) -> tuple:
    "Let TRL train; after each of its steps take one of ours. Seconds of both, without the first."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    seconds, mean_reward = {"TRL": [], "ours": []}, {"TRL": [], "ours": []}
    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs): self.start = clock()
        def on_step_end(self, *args, **kwargs):
            seconds["TRL"].append(clock() - self.start)
            seconds["ours"].append(timed(lambda: mean_reward["ours"].append(ours()), clock))
    def watched(completions, **_):
        r = reward(completions); mean_reward["TRL"].append(sum(r) / len(r)); return r
    B = len(prompts) * G
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, max_steps=repeats + 1,
            disable_tqdm=True, logging_steps=10**6, save_strategy="no", report_to="none",
            per_device_train_batch_size=B, num_generations=G, gradient_accumulation_steps=1, num_iterations=1,
            gradient_checkpointing=False,
            max_completion_length=length, generation_kwargs={"min_new_tokens": length}, temperature=1.0, top_k=0, top_p=1.0,
            beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="group",
            optim="adamw_torch", learning_rate=lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0)
        data = Dataset.from_dict({"prompt": prompts * (repeats + 1)})
        trainer = GRPOTrainer(model, watched, config, train_dataset=data, processing_class=tokenizer, callbacks=[Turns()])
        trainer.train()
    return {k: v[1:] for k, v in seconds.items()}, mean_reward


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--length", type=int, default=64, help="tokens of every output")
    p.add_argument("--prompt-length", type=int, default=16, help="tokens of every prompt")
    p.add_argument("--hidden", type=int, default=64)
    p.add_argument("--layers", type=int, default=2)
    a = options(p, repeats=9)
    warnings.simplefilter("ignore")

    tokenizer = word_tokenizer([f"w{i}" for i in range(243)])
    draw = rng_for("text_step")
    words = a.prompt_length - 1                                                             # the tokenizer adds one token
    prompts = [" ".join(f"w{k}" for k in draw.integers(0, 243, words)) for _ in range(a.prompts)]
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    theirs = small_llama(len(tokenizer), a.hidden, a.layers, a.hidden // 32, 512, **ids)
    mine = copy.deepcopy(theirs).train()
    optimizer = torch.optim.AdamW(mine.parameters(), 1e-3, weight_decay=0.0)
    batch, generator = tokenizer(prompts, return_tensors="pt"), torch.Generator().manual_seed(0)
    judge = lambda tokens: reward(tokenizer.batch_decode(tokens, skip_special_tokens=True))
    ids_NP, mask_NP = batch["input_ids"], batch["attention_mask"].bool()
    ours = lambda: grpo_step(mine, optimizer, ids_NP, mask_NP, a.group, a.length, judge, generator)
    seconds, mean = take_turns(theirs, tokenizer, prompts, a.group, a.length, 1e-3, a.repeats, a.clock, ours)

    import trl
    print(f"\n{a.prompts} prompts x G {a.group} x {a.length} tokens after {ids_NP.shape[1]}; "
          f"Llama of {a.layers} layers, width {a.hidden}")
    print(f"{a.about}, trl {trl.__version__}\n")
    print("| | median s a step | mean reward, first and last step |\n|---|---|---|")
    for name in seconds: print(f"| {name} | {median(seconds[name]):.3f} | {mean[name][0]:.3f}, {mean[name][-1]:.3f} |")
    print(f"\ntimes as fast: {ratio(seconds['TRL'], seconds['ours'])}")


if __name__ == "__main__": main()
