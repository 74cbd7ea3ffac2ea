from __future__ import annotations

import torch

from sphinxkit.sphinx_model.multimodal import join_image, num_positions, num_text_tokens


def test_image_tokens_stand_behind_the_first_token() -> None:
    text, image = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[7.0], [8.0]])
    assert join_image(text, image).flatten().tolist() == [1, 7, 8, 2, 3]
    assert join_image(text, None) is text
    batch = join_image(text.expand(2, -1, -1), torch.stack([image, image + 2]))
    assert batch.squeeze(-1).tolist() == [[1, 7, 8, 2, 3], [1, 9, 10, 2, 3]]
    assert join_image(text[:1], image).flatten().tolist() == [1, 7, 8]


def test_positions_of_text_tokens() -> None:
    """The image belongs to the first token: a cache that holds only a part of the two holds no text."""
    assert [num_positions(count, 2) for count in range(4)] == [0, 3, 4, 5]
    assert [num_text_tokens(count, 2) for count in range(6)] == [0, 0, 0, 1, 2, 3]
    assert [num_positions(count, 0) for count in range(3)] == [num_text_tokens(count, 0) for count in range(3)]
