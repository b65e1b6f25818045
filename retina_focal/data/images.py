"""Images of a dataset: what can't be read is named."""

from collections.abc import Callable

from detectron2.data.detection_utils import SizeMismatchError

from retina_focal.errors import UserError


class BadPicture(UserError):
    """A picture that can't be used, of the file `file_name`."""

    def __init__(self, message: str, file_name: str = ""):
        super().__init__(message, file_name)
        self.file_name = file_name

    def __str__(self) -> str:
        return self.args[0]


def map_record(mapper: Callable[[dict], dict], record: dict) -> dict:
    """What `mapper`, such as `DatasetMapper`, makes of a record of a dataset.

    Raises:
        BadPicture: the image is missing, is no image, or has another size than the record says.
    """
    try:
        return mapper(record)
    except (OSError, SizeMismatchError) as error:
        raise BadPicture(
            f"image '{record['file_name']}' can't be used ({str(error).strip()}); mend the file, "
            "or take the image out of the dataset's annotations",
            record["file_name"],
        ) from error
