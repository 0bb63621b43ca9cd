package seal

import (
	"fmt"
	"os"
	"syscall"
)

// keepOwner gives f to the owner of the file at path, so that whoever rotates a
// key as root does not take the file from the service.
func keepOwner(f *os.File, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) == os.Geteuid() {
		return nil
	}
	if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("%s belongs to user %d, and only that user or root can replace it: %w", path, st.Uid, err)
	}
	return nil
}
