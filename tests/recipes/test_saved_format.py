import torch

from titans_build.recipes.saved_format import checksum


def test_checksum_depends_on_names_and_bytes():
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7), "d": torch.zeros(0)}
    assert checksum(tensors) == checksum(dict(reversed(tensors.items()))) != checksum({})
    for name in "abc":
        assert checksum({**tensors, name: tensors[name] + 1}) != checksum(tensors)
    assert checksum({**tensors, "e": tensors["a"]}) != checksum(tensors)
    swapped = {**tensors, "a": tensors["a"].flip(0)}
    assert checksum(swapped) != checksum(tensors)
