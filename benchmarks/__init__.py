"""Our trainer, sampler and losses against others on one machine: ``make bench``."""
