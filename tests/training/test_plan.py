"""The batch plan."""

import pytest

from ddgan.training.plan import BatchPlan


@pytest.mark.parametrize("images", [1, 7, 24, 25, 100])
@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(4, 1, 1), (3, 2, 1), (2, 3, 2), (1, 1, 5)])
def test_every_epoch_has_every_image_once_and_no_shard_exceeds_the_batch_size(images, batch, accumulation, processes):
    plan = BatchPlan(images, batch, accumulation, processes, seed=3)
    orders = []
    for epoch in range(2):
        order = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            positions = []
            for micro_batch in range(plan.micro_batches(step)):
                shards = [plan.shard(step, micro_batch, rank) for rank in range(processes)]
                assert max(map(len, shards)) <= batch
                positions += [position for shard in shards for position in shard]
            assert positions == list(range(plan.global_batch(step)[2]))
            order += [plan.image_index(step, position) for position in positions]
        assert sorted(order) == list(range(images))
        assert plan.images_seen((epoch + 1) * plan.steps_per_epoch) == (epoch + 1) * images
        orders.append(order)
    assert images < 7 or orders[0] != orders[1]


def test_the_order_of_the_images_is_reproducible_across_versions():
    plan = BatchPlan(10, 4, 1, 1, seed=3)
    assert [plan.image_index(step, 0) for step in range(6)] == [3, 4, 1, 6, 1, 5]
    assert (plan.sample_key(0, 0), plan.sample_key(5, 1)) == (6084141021458535187, 17222890260259461824)
