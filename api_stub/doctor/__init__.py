"""`visionq doctor`: is this Redis fit for the work, do the settings agree, and is anything left lying about?"""

from api_stub.doctor.examine import Finding, Level, examine

__all__ = ["Finding", "Level", "examine"]
