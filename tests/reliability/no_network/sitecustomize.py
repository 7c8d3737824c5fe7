"""Read by every Python process that has this folder in its path, before anything else."""

import network_block

network_block.install()
