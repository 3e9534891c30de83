"""Every method on the same networks, images, budget and seeds.

    python experiments/compare_methods.py --data-dir DATA --depth 20 \
        --methods solo,dml,ekd,ffl,pcl,ffsd --seeds 0,1,2

trains three ResNet-20 at once with each method (for ffsd: the leader and two
common students) on CIFAR-100, and writes RUN_DIR/report.html: for each method
the accuracy of its students, their gain over the same networks trained alone,
the accuracy of the ensemble, and the time and memory of a step. All have the
same recipe; each method's own is in its own experiment. With --ratios each
method compresses, where its maths allows.

Killed, it goes on where it was. Three ResNet-20 take about half a second a step
of 128 images on two CPU cores with solo, twice that with ffsd: with 10,000
images, 10 epochs of all six methods are an hour or two there.
"""

from ekd_jax import comparison
from ekd_jax.comparison import Comparison

if __name__ == "__main__":
  comparison.main(
    Comparison(dataset="cifar100", depth=20, initialization="he"),
    "Trains the same networks with several methods and puts them side by side.",
  )
