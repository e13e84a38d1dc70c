"""What a pre-trained model learns: training runs, probes, and the page LEARNING.md."""
