package statestore

import (
	"syscall"
	"time"
	"unsafe"
)

const clockBoottime = 7 // CLOCK_BOOTTIME, clock_gettime(2)

// now is the time since boot. It runs through a suspend of the machine, where
// Go's monotonic clock stands still and would make an old proof look young.
func now() time.Duration {
	var ts syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		// Every kernel since 2.6.39 has this clock. Without it nothing can be
		// proven, and a time this late lets no proof stand.
		return 1<<63 - 1
	}
	return time.Duration(ts.Nano())
}
