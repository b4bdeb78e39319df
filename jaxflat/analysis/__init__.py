"""Read a sweep's files; write its figures, its page and its summary. Draw measured checkpoints."""

from jaxflat.analysis.page.checkpoint_figures import plot_density, plot_path, plot_trajectory

__all__ = ["plot_density", "plot_path", "plot_trajectory"]
