"""The MLA-Retrofit guide's commands and its Python function, served by mla_pass; see docs/guide.md."""

from mla_retrofit.api import convert_to_mla

__all__ = ["convert_to_mla"]
