"""Image rollouts per second: `JanusPolicy.sample` against transformers' `JanusForConditionalGeneration.generate`.

The same weights, the same guidance. Ours includes tokenizing the prompts and keeping two log-probabilities
for each token; transformers gets tokens and keeps none.

    python tests/benchmarks/image_rollouts.py
    python tests/benchmarks/image_rollouts.py --policy random --threads 1
"""
import argparse
from statistics import median

import torch

import unify_rl
from common import interleave, options, ratio
from unify_rl.core import UserError
from unify_rl.world.prompts import draw_prompts


def load(name: str):
    "A policy by name, or 'random': the shipped architecture with random weights."
    if name != "random": return unify_rl.load_policy(name)
    from unify_rl.policies.janus import new_janus
    from unify_rl.train.pretrain import vocabulary
    return new_janus(vocabulary())


def transformers_generate(policy, context: dict, G: int, cfg: float, sample: bool = True) -> torch.Tensor:
    "[N·G, T] image tokens by transformers' own generate, from prompts that are already tokens."
    from transformers import GenerationConfig
    tok, steps = policy.tokenizer, policy.processor.num_image_tokens
    config = GenerationConfig(do_sample=sample, guidance_scale=cfg, num_return_sequences=G,
                              max_length=context["ids"].shape[1] + steps, pad_token_id=tok.pad_token_id,
                              bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    if sample: config.top_k = 0
    config.generation_kwargs = {"boi_token_id": tok.convert_tokens_to_ids(tok.boi_token)}
    mask = context["mask"].long()
    return policy.janus.generate(context["ids"], attention_mask=mask, generation_mode="image", generation_config=config)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="tiny-janus", help="a policy's name or folder, or 'random' (default: tiny-janus)")
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--cfg", type=float, default=3.0)
    a = options(p, repeats=7)
    if a.cfg == 1: p.error("--cfg 1 is no guidance, and transformers' generate fails on it; take another")
    try: policy = load(a.policy)
    except UserError as e: p.error(str(e))

    prompts = draw_prompts("train", a.prompts)
    context, B = policy._draw_context(prompts), a.prompts * a.group
    show, tokens = policy._show, transformers_generate(policy, context, a.group, a.cfg)
    def ours():                                         # tokens only: the pictures are left out
        policy._show = lambda kind, tokens: [None] * len(tokens)
        return policy.sample(prompts, a.group, torch.Generator().manual_seed(0), cfg=a.cfg).parts[0].actions
    assert ours().shape == tokens.shape == (B, policy.processor.num_image_tokens)
    theirs = lambda: transformers_generate(policy, context, a.group, a.cfg)
    seconds = interleave({"transformers": theirs, "ours": ours, "VQ decoder": lambda: show("image", tokens)}, a.repeats, a.clock)

    print(f"\n{a.policy}: {a.prompts} prompts x G {a.group}, guidance {a.cfg:g}, {tokens.shape[1]} tokens an image")
    print(f"{a.about}\n")
    print("| image tokens by | median s | images/s |\n|---|---|---|")
    for name in ("transformers", "ours"): print(f"| {name} | {median(seconds[name]):.3f} | {B / median(seconds[name]):.0f} |")
    vq = seconds["VQ decoder"]
    with_pictures = {k: [s + v for s, v in zip(seconds[k], vq)] for k in ("transformers", "ours")}
    print(f"\nVQ decoder, the same for both: {median(vq):.3f} s ({B / median(vq):.0f} images/s)")
    print(f"times as fast, tokens only:   {ratio(seconds['transformers'], seconds['ours'])}")
    print(f"times as fast, with pictures: {ratio(with_pictures['transformers'], with_pictures['ours'])}")

    even = draw_prompts("train", 1)                     # one prompt, no padding: both must choose the same tokens
    policy._show = lambda kind, tokens: [None] * len(tokens)
    mine = policy.sample(even, 1, temperature=0, cfg=a.cfg).parts[0].actions
    other = transformers_generate(policy, policy._draw_context(even), 1, a.cfg, sample=False)
    print(f"greedy tokens that agree:     {(mine == other).float().mean():.0%}")


if __name__ == "__main__": main()
