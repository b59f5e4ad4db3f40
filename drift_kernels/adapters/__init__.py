"""One line in a trainer you have: TRL, transformers, verl, torchtitan. Leaves that nothing else here imports.

Each module needs its trainer installed and says how to get it otherwise; importing this package needs none of them.
"""
