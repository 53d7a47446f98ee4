"""What is learned and what is lost: losses, divergences and tolerances."""
