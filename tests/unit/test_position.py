"""A run that goes on in steps of another size takes up at the next image, and finishes its epoch."""

import itertools

from visionmtl.data.sampler import BatchSampler, MixtureSampler
from visionmtl.engine.position import Position, go_on


def test_every_image_of_an_epoch_is_drawn_once_whatever_the_batches_before_and_after():
    for total, before, (batch, world, accumulate) in itertools.product(
        (10, 12), (1, 2, 3, 5), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (3, 1, 1), (2, 2, 1)]
    ):
        mixture, step_images = MixtureSampler([total], [1.0], None, seed=0), batch * world * accumulate
        steps_per_epoch = total // (batch * world) // accumulate
        for steps in range(total // before + 1):
            images = steps * before
            how = go_on(Position(1, images), 20 + steps, steps_per_epoch, step_images, total)
            epoch, done = divmod(20 + steps - how.offset, steps_per_epoch)
            left = (total - images) // step_images
            assert (epoch, done) == ((1, steps_per_epoch - left) if left else (2, 0))
            if not left:
                continue
            drawn = []
            for number in range(left * accumulate):
                for rank in range(world):
                    sampler = BatchSampler(mixture, batch, rank, world)
                    sampler.set_epoch(1, done * accumulate, how.shift)
                    drawn += next(itertools.islice(sampler, number, None))
            assert drawn == mixture.keys(1)[images : images + left * step_images]


def test_steps_of_the_same_size_keep_their_numbers():
    assert go_on(Position(2, 6), 9, steps_per_epoch=4, images_per_step=6, epoch_images=26).offset == 0
