"""A site's side of the link: channel, outbox, policy and the training process."""
