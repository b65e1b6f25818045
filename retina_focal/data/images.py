"""Images of a dataset: what can't be read is named."""

from collections.abc import Callable

from detectron2.data.detection_utils import SizeMismatchError

from retina_focal.errors import UserError


def map_record(mapper: Callable[[dict], dict], record: dict) -> dict:
    """What `mapper`, such as `DatasetMapper`, makes of a record of a dataset.

    Raises:
        UserError: the image is missing, is no image, or has another size than the record says.
    """
    try:
        return mapper(record)
    except (OSError, SizeMismatchError) as error:
        raise UserError(
            f"image '{record['file_name']}' can't be used ({str(error).strip()}); mend the file, "
            "or take the image out of the dataset's annotations"
        ) from error
