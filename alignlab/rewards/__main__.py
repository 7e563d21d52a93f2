"""`python -m alignlab.rewards` is the command of alignlab/rewards_table.py."""

from alignlab.rewards_table import main

if __name__ == "__main__":
    main()
