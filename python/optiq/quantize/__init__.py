"""The main job: measure, plan, round, write, and measure what came out."""
