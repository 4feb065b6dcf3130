"""What is read from a device at once comes apart again."""

import torch

from vllm_adapmoe.integration.layers.step_routing import StepRouting, pack, read_together, unpack


def test_tensors_of_any_width_are_packed_and_come_apart():
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(6, dtype=torch.int32).view(3, 2),
        torch.tensor([0.5, 1e-12, 3.0], dtype=torch.float64),
        torch.zeros(0, 4),
        torch.randn(3, 5).T,
    ]
    flat = pack(tensors)
    assert flat.dtype == torch.uint8 and len(flat) == 3 + 24 + 24 + 60
    for one, view in zip(tensors, unpack(flat, tensors), strict=True):
        assert view.dtype == one.dtype and torch.equal(view, one)


def test_on_the_host_nothing_is_copied():
    ids, keep = torch.arange(4), torch.ones(4, dtype=torch.bool)
    read = read_together(ids, None, keep)
    assert read[0] is ids and read[1] is None and read[2] is keep


def test_padding_keeps_nothing():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    step = StepRouting(torch.zeros(3, 4), torch.ones(3, 2), ids, torch.tensor([True, True, False]), None)
    assert step.ungated_mask().tolist() == [[True, True], [True, True], [False, False]]


def test_failed_rows_need_what_a_healthy_row_needs():
    """Padding, whose ids are -1, is no healthy row."""
    ids = torch.tensor([[-1, -1], [3, 4], [5, 6]])
    step = StepRouting(torch.zeros(3, 2), torch.ones(3, 2), ids, torch.tensor([False, True, True]), None)
    left = step.replace_failed(torch.tensor([False, True, False]))
    assert left is not None and left.ids.tolist() == [[-1, -1], [5, 6], [5, 6]]
    assert step.replace_failed(torch.tensor([False, True, True])) is None
