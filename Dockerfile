# A static keygate on distroless, as a user without rights.
#
#   docker build -t keygate:local --build-arg VERSION=$(git describe --tags --always) .

# Go runs on the builder's own platform and cross-compiles.
FROM --platform=$BUILDPLATFORM golang:1.26.8-trixie AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=
ARG TARGETOS TARGETARCH
# The Makefile holds the build's flags, for here and everywhere else.
RUN GOOS=$TARGETOS GOARCH=$TARGETARCH make build VERSION="$VERSION"
# A volume that is mounted on one of these takes over owner and mode.
RUN install -d -m 0700 /out/data /out/sockets

FROM gcr.io/distroless/static-debian13:nonroot
COPY --from=build --chown=65532:65532 /out/ /
COPY --from=build /src/bin/keygate /usr/local/bin/keygate
USER 65532:65532
ENV KEYGATE_DATA_DIR=/data
VOLUME /data
# ext_authz; health and metrics. Both listen on loopback unless told otherwise.
EXPOSE 9000 8081
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["keygate", "status"]
ENTRYPOINT ["keygate"]
CMD ["serve"]
