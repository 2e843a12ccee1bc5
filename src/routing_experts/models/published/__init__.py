"""Checkpoints in the layouts that other people's code publishes, read into models of transformers' layout.

A layout is a set of anchored renames from names of files to names of the model; every name on either side has to be
accounted for before any weight is read. ``reading`` tells the layouts apart; ``roe`` reads what RoE's authors train.
"""
