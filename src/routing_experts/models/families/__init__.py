"""The model families that can be routed, one small declarative file each.

A family says where its pictures' token ids are; its decoder layers are found through transformers'
``get_decoder()``. A new family is a new file with one ``register(Family(...))`` line, imported below.
"""

from routing_experts.models.families.registry import Family, family_of, known_families, register

__all__ = ["Family", "family_of", "known_families", "register"]
