"""`check_contract`: the shipped policies keep its promises, and a policy that breaks one hears which."""
import pytest
import torch
from torch import nn

from unify_rl.core import Part, Prompt, Rollout, UserError
from unify_rl.data.stream import shapes_prompts
from unify_rl.policies.base import Policy, check_contract
from unify_rl.policies.load import load_policy
from unify_rl.train.config import load_config


@pytest.mark.parametrize("name", ["tiny-janus", "tiny-bagel", "tiny-dimoo"])
def test_shipped_policies_keep_it(name):
    prompts = shapes_prompts("train", ("answer",), questions=4)[:2]
    prompts += [Prompt("d/0", "generate", "a red circle"), Prompt("d/1", "generate", "a blue square above a green cross")]
    policy = load_policy(name)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    rows = check_contract(policy, prompts, max_text=16, **load_config("grpo", name).rollout.drawing)
    assert {row["kind"] for row in rows} == {"text", "image"} and max(row["gap"] for row in rows) < 1e-3
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained


class Words(Policy):
    "Three words for each prompt, one after the other, with learned probabilities."
    tasks, name, trains = ("answer",), "words", ("logits",)

    def __init__(self):
        super().__init__()
        self.logits, self.frozen = nn.Parameter(torch.arange(5.0)), nn.Parameter(torch.ones(2))

    def sample(self, prompts, group_size, generator=None, **_):
        B = len(prompts) * group_size
        a = self.logits.detach().softmax(0).expand(B, 5).multinomial(3, replacement=True, generator=generator)
        part = Part("text", torch.arange(B), a, torch.arange(3).expand(B, 3) < 2, {"n": torch.zeros(len(prompts))}, torch.arange(B) // group_size)
        part.logp_old = Words.logp(self, part).detach()
        return Rollout(prompts, group_size, [part], [str(x) for x in a.tolist()], [None] * B)

    def logp(self, part): return self.logits.log_softmax(0)[part.actions] * part.mask


ASKED = [Prompt("q/0", "answer", "which?"), Prompt("q/1", "answer", "and then?")]


def test_a_sound_policy_passes_and_stays_as_it_was():
    policy = Words()
    [row] = check_contract(policy, ASKED, 3)
    assert row["recorded"] and row["logp"] == [6, 3] and policy.frozen.requires_grad and policy.logits.grad is None


def broken(**methods): return type("Broken", (Words,), methods)()


def resampled(change):
    "A policy whose rollouts are changed after they were sampled."
    def sample(self, *args, **more):
        rollout = Words.sample(self, *args, **more)
        change(rollout)
        return rollout
    return broken(sample=sample)


FAULTS = {
    "own dice": (broken(sample=lambda self, prompts, G, generator=None, **_: Words.sample(self, prompts, G, None)), "same outputs for the same generator"),
    "a row without a part": (resampled(lambda ro: ro.parts.__setitem__(0, ro.parts[0].select(torch.arange(5)))), r"every output has a row of a part; without one: \[5\]"),
    "no text": (resampled(lambda ro: ro.texts.__setitem__(2, None)), r"the task 'answer' has a text \(output 2"),
    "shape": (broken(logp=lambda self, part: Words.logp(self, part).sum(1)), r"the shape of the mask, \[6, 3\]; it has \[6\]"),
    "mask": (broken(logp=lambda self, part: self.logits.log_softmax(0)[part.actions]), "0 where the mask is False"),
    "ratio": (broken(logp=lambda self, part: (self.logits / 2).log_softmax(0)[part.actions] * part.mask), "on-policy the ratio is 1"),
    "neighbours": (broken(logp=lambda self, part: Words.logp(self, part) - (len(part) != 6) * part.mask.float()), "does not depend on the rows beside it"),
    "gradient": (broken(logp=lambda self, part: Words.logp(self, part).detach() + 0 * self.logits.sum()), "it is 0 everywhere"),
    "not finite": (broken(logp=lambda self, part: Words.logp(self, part) + 0 * (self.logits - self.logits.detach()).abs().sqrt().sum()), "the gradient is finite; that of logits is not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_promise_is_named(fault):
    policy, complaint = FAULTS[fault]
    with pytest.raises(UserError, match=complaint): check_contract(policy, ASKED, 3)
