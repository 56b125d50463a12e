"""The transition kernel of a Gibbs sweep, by hand from listed joint states, and what a sweep does beside it."""

import itertools

import torch
from brute_force import BruteForce
from stats import frequencies_agree


def coordinates(brute, latents, row):
    """Codes of each joint state `[C, coordinates]` of a row, in the order of a sweep."""
    columns = []
    for latent in latents:
        codes = latent.encode(brute.z[latent.name])  # [C, *plates, components]
        plates = [None] * len(latent.batch_shape)
        for dim, at in zip(brute.batch, row, strict=True):
            plates[dim] = at
        codes = codes[(slice(None), *(slice(None) if at is None else at for at in plates))]
        codes = codes.reshape(len(codes), -1, latent.components)
        columns += [codes[:, :, j] for j in range(latent.components)]
    return torch.cat(columns, 1)


def transition(brute, latents, row):
    """The kernel `[C, C]` of one sweep, as a product of conditionals found by comparing joint states."""
    codes = coordinates(brute, latents, row)
    p = brute.weights[(slice(None), *row)]
    kernel = torch.eye(len(codes))
    for j in range(codes.shape[1]):
        rest = torch.cat([codes[:, :j], codes[:, j + 1 :]], 1)
        same = (rest.unsqueeze(1) == rest.unsqueeze(0)).all(-1)
        joint = same * p
        kernel = kernel @ (joint / joint.sum(1, keepdim=True).clamp_min(1e-300))
    return kernel


def observed_transitions(sweep, brute, latents, n):
    """Counts `[C, *batch, C]` of where one sweep leads from each state, n chains a state, all rows at once."""
    states = len(brute.states)
    start = {s.name: s.encode(brute.z[s.name]).repeat_interleave(n, 0) for s in latents}
    sweep.start(start)
    sweep.sweep()
    after = sweep.present()
    found = {}
    for row in itertools.product(*(range(brute.sizes[d]) for d in brute.batch)):
        z = {s.name: s.decode(after[s.name].long()) for s in latents}
        reached = BruteForce.__new__(BruteForce)
        reached.z, reached.batch = z, brute.batch
        target = coordinates(brute, latents, row)
        here = coordinates(reached, latents, row)
        match = (here.unsqueeze(1) == target.unsqueeze(0)).all(-1)
        assert bool((match.sum(1) == 1).all())
        found[row] = match.reshape(states, n, states).sum(1)
    return found


def kernel_agrees(sweep, brute, latents, n):
    counts = observed_transitions(sweep, brute, latents, n)
    observed, expected = [], []
    for row, table in counts.items():
        possible = brute.weights[(slice(None), *row)] > 0
        observed.append(table[possible].flatten())
        expected.append(transition(brute, latents, row)[possible].flatten())
    return frequencies_agree(torch.cat(observed), n, torch.cat(expected))
