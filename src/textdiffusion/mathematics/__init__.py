"""What can be said without a network: randomness, laws, schedules, grids, and worlds small enough to know exactly.

noise.py, categorical.py, cross_entropy.py, gaussian.py, schedules.py, grids.py, automaton.py, worlds.py
"""
