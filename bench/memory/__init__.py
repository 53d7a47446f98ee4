"""Memory: what a step and a merge hold, beside what the planner predicts."""
