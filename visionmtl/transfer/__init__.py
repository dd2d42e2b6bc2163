"""What a run takes over from trained networks: teachers, and one file per way of adding tasks to one."""
