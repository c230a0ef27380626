# syntax=docker/dockerfile:1
# The S3 server's own image runs as root; this one does not, and owns its folder.
FROM versity/versitygw:v1.8.0
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
