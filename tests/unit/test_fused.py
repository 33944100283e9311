"""Layers with a common input computed as one give what each alone would."""

import torch
from torch import nn

from mpinfer.models.fused import FusedLinear, FusedMember, concatenated, find_group


class Mlp(nn.Module):
    def __init__(self, bias=(True, True)):
        super().__init__()
        self.gate_proj = nn.Linear(8, 12, bias[0])
        self.up_proj = nn.Linear(8, 12, bias[1])
        self.down_proj = nn.Linear(12, 8)


def fused(layers):
    group = FusedLinear(concatenated(layers), 8, [layer.out_features for layer in layers])
    return group, [FusedMember(group, member) for member in range(len(layers))]


def test_groups_are_layers_of_one_module_that_can_have_one_input():
    assert find_group(Mlp(), "up_proj") == ["gate_proj", "up_proj"]
    assert find_group(Mlp(), "down_proj") == []
    assert find_group(Mlp(bias=(True, False)), "up_proj") == []
    odd = Mlp()
    odd.up_proj = nn.Linear(9, 12)
    assert find_group(odd, "gate_proj") == []


@torch.inference_mode()
def test_members_compute_what_the_layers_compute():
    torch.manual_seed(0)
    layers = [nn.Linear(8, width) for width in (6, 2, 3)]
    group, members = fused(layers)
    for _ in range(2):
        x = torch.randn(1, 5, 8)
        for member, layer in zip(members, layers, strict=True):
            torch.testing.assert_close(member(x), layer(x))
    assert group._input is None  # nothing is held once all have been asked


@torch.inference_mode()
def test_each_member_may_get_an_input_of_its_own():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 4) for _ in range(2)]
    _, members = fused(layers)
    for _ in range(3):  # the memory of an old input may be given to a new one
        for member, layer in zip(members, layers, strict=True):
            x = torch.randn(1, 5, 8)
            torch.testing.assert_close(member(x), layer(x))


@torch.inference_mode()
def test_a_common_input_is_computed_once():
    layers = [nn.Linear(8, 4) for _ in range(2)]
    group, members = fused(layers)
    calls = []
    group.whole.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 5, 8)
    for member in members:
        member(x)
    assert len(calls) == 1
