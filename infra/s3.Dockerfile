# syntax=docker/dockerfile:1
# The S3 server's own image names no user, so it would run as root. Here it does not, and owns its folder.
FROM versity/versitygw:v1.8.0
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
