"""A reference that moves with the policy."""

import pytest
import torch

from alignlab.objectives.snapshot import Snapshot
from tests.conftest import tiny_policy


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_snapshot_is_the_policy_as_it_was(full, checkpointing, tiny_sd) -> None:
    """Bit for bit, whatever the policy has become since; it is put away again, also after an error; the
    gradient around it is that of the policy alone, a recomputed one too; and `policy.reference()` stays the
    pretrained model."""
    policy, snapshot = tiny_policy(tiny_sd, full=full, checkpointing=checkpointing), Snapshot()
    cond, t, x = policy.encode(["a cat"]), torch.tensor([500]), torch.randn(1, *policy.latent_shape)

    def out(reference=None):
        if reference is None:
            return policy.predict(x, t, cond, 1.0)
        with reference:
            return policy.predict(x, t, cond, 1.0)

    with torch.no_grad():
        pretrained, then = out(policy.reference()), out()
        assert torch.equal(out(snapshot.reference(policy)), pretrained)
    snapshot.take(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        now = out()
    assert not torch.equal(now, then) and torch.equal(out(snapshot.reference(policy)), then)
    restored = Snapshot()
    restored.load_state_dict(snapshot.state_dict())
    assert torch.equal(out(restored.reference(policy)), then)
    plain = torch.autograd.grad(out().square().sum(), policy.parameters())
    before = out()
    assert not out(snapshot.reference(policy)).requires_grad
    around = torch.autograd.grad(before.square().sum(), policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))
    with pytest.raises(KeyError), snapshot.reference(policy):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(out(), now) and torch.equal(out(policy.reference()), pretrained)
