"""Whether a run that is resumed finds the data that it was begun with; asked before anything is started."""

from taid_ray.checkpoint.store import STATE_FILE, STORAGE_ERRORS, CheckpointStore, TrainingState, step_of
from taid_ray.config.schema import DistillConfig
from taid_ray.data.cursor import BlockCursor
from taid_ray.data.fingerprint import Fingerprint, changes
from taid_ray.errors import CheckpointError, ConfigError, DataError
from taid_ray.run.directory import RunManifest, moved_data


def check_same_data(config: DistillConfig, now: Fingerprint) -> str | None:
    """Compares the fingerprint of the data with the one in the newest checkpoint of the run that is in `config.run_dir`.

    Returns a note if that cannot be done, because the checkpoint is of an older version. Raises DataError, which says what
    has changed, ConfigError if it was made in another order of the data, and CheckpointError if the storage cannot be
    reached. Without a checkpoint the run begins at step 1, with whatever data.
    """
    newest = _newest_state(CheckpointStore(RunManifest(config).checkpoints))
    if newest is None:
        return None
    step, state = newest
    if isinstance(state.cursor, BlockCursor) != (config.data.order == "blocks"):
        then = "blocks" if isinstance(state.cursor, BlockCursor) else "global"
        raise ConfigError(
            f"data.order: {config.data.order}, but the checkpoint of step {step} in {config.run_dir} was made with {then}; set "
            f"data.order={then} to resume the run, or begin a new one with --out"
        )
    if state.data is None:
        if moved := moved_data(config):
            raise DataError(
                f"{'; '.join(moved)}: whether these are the same data cannot be told, because the checkpoint of step {step} "
                f"holds no fingerprint of its data. Give the old path to resume the run, or begin a new one with --out."
            )
        return (
            f"the checkpoint of step {step}, of an older version of taid-ray, holds no fingerprint of its data; "
            "whether these are the same is not checked, and older versions also read hidden files and all splits of a directory"
        )
    if changed := changes(state.data, now):
        raise DataError(
            f"the data are not those that the run in {config.run_dir} was trained on up to step {step}: {'; '.join(changed)}. "
            f"Bring the old data back to resume the run, or begin a new one with --out."
        )
    return None


def _newest_state(store: CheckpointStore) -> tuple[int, TrainingState] | None:
    """Step and state of the newest checkpoint that has a readable one."""
    try:
        for name in store.names():
            try:
                index = store.index(name)
                return step_of(name), TrainingState.from_json(store.read(name, STATE_FILE, index[STATE_FILE]))
            except (CheckpointError, KeyError):  # the workers pass it over, too, and say so
                continue
    except STORAGE_ERRORS as error:
        raise CheckpointError(
            f"the checkpoints in {store.location} cannot be read: {error}; look after the storage, and start the run again"
        ) from None
    return None
