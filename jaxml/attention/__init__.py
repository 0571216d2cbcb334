"""Exact attention: one public function, `flash_attention`, and a backend for each place it runs."""

from jaxml.attention import paged
from jaxml.attention.dispatch import Explanation, explain, flash_attention
from jaxml.attention.masks import Causal, Chunked, Fn, Lengths, Mask, Prefix, Segments, Window
from jaxml.attention.masks import Dense as Array
from jaxml.attention.paged import Pages, paged_attention
from jaxml.attention.ring import ring_attention, zigzag_order

__all__ = [
    "Array",
    "Causal",
    "Chunked",
    "Explanation",
    "Fn",
    "Lengths",
    "Mask",
    "Pages",
    "Prefix",
    "Segments",
    "Window",
    "explain",
    "flash_attention",
    "paged",
    "paged_attention",
    "ring_attention",
    "zigzag_order",
]
