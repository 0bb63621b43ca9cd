//go:build !noembed

package embedded

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// endStreams ends watches and the other open streams when the context does.
// etcd itself waits more than five seconds for a watch that was opened just
// before the stop, one stop in ten. The client is told Unavailable: it takes up
// its watch where it was once etcd is back, and with most other codes it would
// give up.
func endStreams(stopping context.Context) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		ctx, cancel := context.WithCancel(stream.Context())
		defer cancel()
		defer context.AfterFunc(stopping, cancel)()
		err := handler(srv, endingStream{stream, ctx})
		if stopping.Err() != nil {
			return status.Error(codes.Unavailable, "etcd is stopping")
		}
		return err
	}
}

type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }
