"""What families share: each kind of noise (absorbing, replacing, coded), and the steps back from it.

A family is one of absorbing.py, replacing.py and coded.py made whole. denoising.py, renewing.py, unmasking.py and
ordering.py are steps; conditioning.py, guidance.py and drafts.py what is given, told and held to.
"""
