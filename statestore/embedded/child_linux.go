package embedded

import "syscall"

// childAttributes put the child in a process group of its own, so that a
// Ctrl-C meant for the parent does not stop etcd before its clients, and end it
// when the thread that started it ends, which is with the parent.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
