"""Batch inference: continuous batching over many requests, and resumable runs over files of prompts."""

from __future__ import annotations

from sphinxkit.batch_inference.files import Summary, answer_file
from sphinxkit.batch_inference.fingerprint import fingerprint
from sphinxkit.batch_inference.loop import Answer, answer_requests
from sphinxkit.batch_inference.rank_files import part_path
from sphinxkit.batch_inference.requests import BadRow, Defaults, Request, parse_request, read_lines

__all__ = [
    "Answer",
    "BadRow",
    "Defaults",
    "Request",
    "Summary",
    "answer_file",
    "answer_requests",
    "fingerprint",
    "parse_request",
    "part_path",
    "read_lines",
]
