"""Converters from common annotation formats to conversation JSON lines."""

from sphinxkit.data.converters.base import Converted, Malformed, Problems, Source
from sphinxkit.data.converters.convert import FORMATS, ConversionReport, convert_data, convert_records

__all__ = [
    "FORMATS",
    "ConversionReport",
    "Converted",
    "Malformed",
    "Problems",
    "Source",
    "convert_data",
    "convert_records",
]
