"""Many prompts from a file, answered by continuous batching into a file that a killed run goes on from."""

from __future__ import annotations

from sphinxkit.batch_inference.answering import Answered, answer_requests
from sphinxkit.batch_inference.files import Summary, answer_file
from sphinxkit.batch_inference.parts import part_path
from sphinxkit.batch_inference.requests import Defaults, Request, parse_request, read_lines

__all__ = [
    "Answered",
    "Defaults",
    "Request",
    "Summary",
    "answer_file",
    "answer_requests",
    "parse_request",
    "part_path",
    "read_lines",
]
