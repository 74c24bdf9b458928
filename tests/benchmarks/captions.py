"""Captions by interview: several questions about each picture, with the picture read once, once a question, and not at all the second time.

Equal in the first two rows: pictures, questions, answers (checked). They differ in whether the questions about a picture share one
picture object, by which the policy knows that it need be read only once. The third row asks again for the same pictures.

    python tests/benchmarks/captions.py
    python tests/benchmarks/captions.py --threads 1 --clock cpu
"""
import argparse
from statistics import median

from common import interleave, options, ratio
from unify_rl.core import Prompt, rng_for
from unify_rl.policies.load import load_policy
from unify_rl.rewards.cycle import INTERVIEWS, Captions, PolicyCaptioner
from unify_rl.world.scenes import World, random_scene, render


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="tiny-janus", help="a policy with an interview (default: tiny-janus)")
    p.add_argument("--pictures", type=int, default=96)
    a = options(p, repeats=5)
    policy, interview = load_policy(a.policy).requires_grad_(False), INTERVIEWS[a.policy]
    images = [render(random_scene(World(), rng_for("benchmark", i), n=1 + i % 3)) for i in range(a.pictures)]

    def ask(picture) -> list[str]:
        asked = [Prompt(f"{i}/{k}", "answer", q, image=picture(im)) for i, im in enumerate(images) for k, q in enumerate(interview.questions)]
        return [t for i in range(0, len(asked), 256) for t in policy.say(asked[i:i+256], interview.max_text, interview.without, interview.until)]
    remembered = Captions(PolicyCaptioner(policy, interview))
    jobs = {"once a question": lambda: ask(lambda im: im.copy()), "once": lambda: ask(lambda im: im), "again": lambda: remembered(images)}
    assert jobs["once"]() == jobs["once a question"]()
    seconds = interleave(jobs, a.repeats, a.clock)

    print(f"\n{a.policy}: {a.pictures} pictures, {len(interview.questions)} questions each\n{a.about}\n")
    print("| a picture is read | median s | pictures/s | times as fast |\n|---|---|---|---|")
    for name, s in seconds.items():
        print(f"| {name} | {median(s):.4f} | {a.pictures / median(s):.0f} | {ratio(seconds['once a question'], s)} |")


if __name__ == "__main__": main()
