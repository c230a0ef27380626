"""The causal transformer: it does not look ahead, and one token at a time is the same as all at once."""

import torch

from worker.families.nets.causal_transformer import CausalTransformer, RmsNorm, TransformerLayout

LAYOUT = TransformerLayout(width=64, depth=2, num_heads=2)
CPU = torch.device("cpu")


def transformer(num_tokens: int = 10) -> CausalTransformer:
    """With weights that are not zero anywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CausalTransformer(LAYOUT, num_inputs=12, num_outputs=9, num_tokens=num_tokens)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.requires_grad_(requires_grad=False)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(1))


def test_a_later_token_changes_no_earlier_logit() -> None:
    net, before = transformer(), tokens(1, 10)
    logits = net(before)

    for place in range(1, 10):
        after = before.clone()
        after[0, place] = (after[0, place] + 1) % 9
        changed = net(after)

        assert torch.allclose(changed[:, :place], logits[:, :place], atol=1e-6)
        assert (changed[:, place] - logits[:, place]).abs().max() > 1e-3


def test_one_token_at_a_time_gives_the_logits_of_all_at_once() -> None:
    net, sequences = transformer(), tokens(3, 10)
    cache = LAYOUT.empty_cache(3, 10, CPU)

    stepped = [net.step(sequences[:, place], torch.full((3,), place), cache) for place in range(10)]

    assert (torch.stack(stepped, dim=1) - net(sequences)).abs().max() < 1e-5


def test_slots_may_be_at_different_places() -> None:
    """One is three tokens ahead of the other, in a cache that holds somebody else's leftovers."""
    net, sequence = transformer(), tokens(10)
    cache = torch.full_like(LAYOUT.empty_cache(2, 10, CPU), 7.0)
    for place in range(3):
        net.step(sequence[[place, 0]], torch.tensor([place, 0]), cache)

    both = [net.step(sequence[[3 + place, place]], torch.tensor([3 + place, place]), cache) for place in range(4)]

    logits = net(sequence[None])[0]
    assert (torch.stack([pair[0] for pair in both]) - logits[3:7]).abs().max() < 1e-5
    assert (torch.stack([pair[1] for pair in both]) - logits[:4]).abs().max() < 1e-5


def test_before_training_everything_is_equally_likely() -> None:
    net = CausalTransformer(LAYOUT, num_inputs=12, num_outputs=9, num_tokens=10)

    assert not net(tokens(2, 10)).any()


def test_every_weight_gets_a_gradient() -> None:
    net = transformer().requires_grad_()

    net(tokens(2, 10)).square().sum().backward()

    assert [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_the_norm_is_that_of_torch() -> None:
    norm, x = RmsNorm(64), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    assert torch.allclose(norm(x), torch.nn.functional.rms_norm(x, (64,), eps=1e-6), atol=1e-6)
